"""`snugpt gpus`: the cards snugpt knows, and where every figure was read."""

from __future__ import annotations

import sys
from typing import Any, get_args

import click
import msgspec

from snugpt.cli.screen import colour, row
from snugpt.errors import bad_value
from snugpt.spec.catalogue import catalogue, find_gpu
from snugpt.spec.gpu import Backend, Dtype, Gpu
from snugpt.units import GIB, gib

RATES: tuple[Dtype, ...] = ("fp32", "tf32", "fp16", "bf16", "fp8")
SOLD_SHARE = 0.93  # of the "24 GB" on its box a card reports at least this, in GiB (L4, A10: 0.937)
RECALLED = "~"  # stands before a figure that was on none of the sources


@click.command()
@click.argument("card", required=False)
@click.option("--min-memory", type=float, metavar="GB", help="Memory at least, as it is sold.")
@click.option("--capability", metavar="8.0", help="CUDA compute capability at least.")
@click.option("--backend", type=click.Choice(get_args(Backend)), help="cuda, mps, ...")
@click.option("--search", metavar="TEXT", help="Words in the name.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def gpus(
    card: str | None,
    min_memory: float | None,
    capability: str | None,
    backend: Backend | None,
    search: str | None,
    as_json: bool,
) -> None:
    """List the cards, or show CARD whole with its sources.

    \b
    Examples:
      snugpt gpus --min-memory 24 --capability 8.0
      snugpt gpus rtx-4090
    """
    if card is not None:
        gpu = find_gpu(card)
        _print_json(gpu) if as_json else _print_card(gpu)
        return
    least = _capability(capability)
    if min_memory is not None and not 0 <= min_memory < 1e9:
        raise bad_value("min_memory", min_memory, "GB from 0 up", hint="snugpt gpus")
    found = [
        gpu
        for gpu in catalogue().values()
        if (min_memory is None or gpu.memory_bytes >= min_memory * SOLD_SHARE * GIB)
        and (least is None or (gpu.capability or (0, 0)) >= least)
        and (backend is None or gpu.backend == backend)
        and (search is None or _matches(gpu, search))
    ]
    if as_json:
        _print_json({"gpus": found})
    else:
        _print_table(found)


def _capability(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, _, minor = text.partition(".")
    if not (major.isdecimal() and (minor or "0").isdecimal() and len(text) < 10):
        raise bad_value("capability", text, "such as 8.0", hint="snugpt gpus --capability 8.0")
    return int(major), int(minor or "0")


def _matches(gpu: Gpu, search: str) -> bool:
    words = search.lower().replace("-", " ").split()
    text = " ".join((gpu.id, gpu.name, *gpu.aliases)).lower()
    return all(word in text for word in words)


def _print_json(value: Any) -> None:
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    sys.stdout.write(text + "\n")


def _print_table(found: list[Gpu]) -> None:
    if not found:
        click.echo("no card matches\nhint: snugpt gpus", err=True)
        return
    head = f"{'card':<20}{'GiB':>6}{'GB/s':>7}{'cap':>6}"
    click.echo(head + "".join(f"{name:>8}" for name in RATES), color=colour())
    for gpu in found:
        flops = RECALLED if "flops" in gpu.recalled else ""
        rates = (gpu.flops.get(name) for name in RATES)
        cells = [flops + _tera(rate) if rate else "-" for rate in rates]
        usable = _figure(gpu, "usable_bytes", f"{gpu.usable_bytes / GIB:.1f}")
        per_s = f"{gpu.bandwidth_bytes_per_s / 1e9:.0f}"
        bandwidth = _figure(gpu, "bandwidth_bytes_per_s", per_s)
        version = _figure(gpu, "capability", _version(gpu))
        line = f"{gpu.id:<20}{usable:>6}{bandwidth:>7}{version:>6}"
        click.echo(line + "".join(f"{cell:>8}" for cell in cells), color=colour())
    click.echo(
        f"GiB a process can have; rates in TFLOP/s; {RECALLED} recalled, not read from a source."
    )


def _tera(rate: float) -> str:
    """A rate in TFLOP/s, three digits or whole."""
    return f"{rate / 1e12:.3g}" if rate < 1e15 else f"{rate / 1e12:.0f}"


def _figure(gpu: Gpu, field: str, text: str) -> str:
    return (RECALLED if field in gpu.recalled else "") + text


def _version(gpu: Gpu) -> str:
    return ".".join(map(str, gpu.capability)) if gpu.capability else "-"


def _links(gpu: Gpu) -> str:
    """What the links carry in one direction: to the CPU, to other cards."""
    if gpu.unified:
        return "memory shared with the CPU"
    host = gpu.host_link_bytes_per_s
    bus = "PCIe {}.0 x{}, ".format(*gpu.pcie) if gpu.pcie else ""
    parts = [bus + _per_s(gpu, "host_link_bytes_per_s", host) + " to the CPU"]
    if gpu.peer_link_bytes_per_s:
        peer = _per_s(gpu, "peer_link_bytes_per_s", gpu.peer_link_bytes_per_s)
        parts.append(f"NVLink {peer} to other cards")
    return "; ".join(parts) + "; each way"


def _per_s(gpu: Gpu, field: str, rate: float | None) -> str:
    return _figure(gpu, field, f"{rate / 1e9:.4g} GB/s") if rate else "unknown"


def _print_card(gpu: Gpu) -> None:
    """Every field of a card with its sources."""
    rates = ", ".join(f"{name} {_tera(rate)}" for name, rate in gpu.flops.items())
    fields = {
        "card": f"{gpu.id}: {gpu.name}",
        "memory": f"{gib(gpu.memory_bytes)}, {gib(gpu.usable_bytes)} of it for a process",
        "speed": f"{gpu.bandwidth_bytes_per_s / 1e9:.4g} GB/s; TFLOP/s {rates}",
        "links": _links(gpu),
        "power": _figure(gpu, "power_w", f"{gpu.power_w:g} W") if gpu.power_w else "not known",
        "backend": gpu.backend + (f", capability {_version(gpu)}" if gpu.capability else ""),
        "pytorch": gpu.pytorch,
        "recalled": ", ".join(gpu.recalled) or "nothing, every figure was read",
        "read on": gpu.date,
    }
    for label, text in fields.items():
        for line in row(label, text):
            click.echo(line, color=colour())
    for source in gpu.sources:
        click.echo(f"  {source}", color=colour())

"""What this machine has and lacks to train: driver, cards, PyTorch, disk, RAM. Each a check.

ok       as it should be
warning  it works, and something will stand in the way
missing  training on a GPU is not possible like this
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from snugpt.errors import SnugError
from snugpt.planner.doctor.cards import Card, Driver, driver_at_hand
from snugpt.planner.doctor.torch_build import TorchBuild, torch_at_hand
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.host import cpu_capacity_bytes
from snugpt.units import GIB, MIB, gib

SCHEMA = 1
Status = Literal["ok", "warning", "missing"]
RUNS = Path("runs")
DEFAULT_WHEELS = "default wheels"
# From 536.40 on NVIDIA's driver for Windows moves to the host what the card can't hold, and a
# program goes on slowly; 546.01 brought the setting against it. Read on
# https://nvidia.custhelp.com/app/answers/detail/a_id/5490; that WSL does the same is assumed.
FIRST_SPILLING, FIRST_WITH_SETTING = (536, 40), (546, 1)
SPILL_ADVICE = "NVIDIA Control Panel, Manage 3D settings: CUDA - Sysmem Fallback Policy"
# What a small run and its two checkpoints take; below it a warning.
LITTLE_DISK_BYTES = 10 * GIB
LITTLE_RAM_BYTES = 4 * GIB
LITTLE_SHARED_BYTES = 256 * MIB  # Docker gives 64 MiB
MUCH_HELD_BYTES = 512 * MIB
MOST_PROCESSES = 4
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at; `hint` is what to do about it."""

    name: str
    status: Status
    text: str
    hint: str | None = None


class MachineReport(msgspec.Struct, frozen=True, kw_only=True):
    """The checks of a machine, and what they rest on."""

    schema: int = SCHEMA
    checks: tuple[Check, ...]
    driver: Driver | None
    torch: TorchBuild | None


def check_machine(runs: Path = RUNS) -> MachineReport:
    """Look at this machine; nothing is changed and nothing is started."""
    driver, torch = driver_at_hand(), torch_at_hand()
    checks = (
        _system(),
        *_driver(driver),
        *_torch(torch, driver),
        *_variables(driver),
        *_host(),
        _disk(runs),
    )
    return MachineReport(checks=checks, driver=driver, torch=torch)


def is_wsl(release: str | None = None) -> bool:
    """Whether this Linux runs under Windows."""
    return "microsoft" in (platform.release() if release is None else release).lower()


def _system() -> Check:
    wsl = ", under Windows (WSL)" if is_wsl() else ""
    text = f"{platform.system()} {platform.release()}{wsl}, Python {platform.python_version()}"
    return Check(name="system", status="ok", text=text)


def _driver(driver: Driver | None) -> Iterator[Check]:
    if driver is None or not driver.cards:
        text = "no NVIDIA driver with a card answers here"
        yield Check(name="gpu", status="missing", text=text, hint=_without_card())
        return
    cuda = "" if driver.cuda is None else f", CUDA up to {driver.cuda[0]}.{driver.cuda[1]}"
    yield Check(name="driver", status="ok", text=f"{driver.version}{cuda}, by {driver.told_by}")
    for card in driver.cards:
        yield from _card(card)
    yield from _spill(driver, on_windows=sys.platform == "win32" or is_wsl())


def _without_card() -> str:
    if shutil.which("nvidia-smi"):
        return "nvidia-smi"
    return "snugpt plan --gpu cpu"


def _card(card: Card) -> Iterator[Check]:
    """The card's memory and who holds it."""
    held = card.total_bytes - card.free_bytes - (card.kept_bytes or 0)
    listed = [process for process in card.processes if process.bytes or process.draws]
    text = f"{card.name}: {gib(card.free_bytes)} of {gib(card.total_bytes)} free"
    if card.kept_bytes:
        text += f", the driver keeps {gib(card.kept_bytes)}"
    if card.display:
        text += ", draws a display"
    much = held > MUCH_HELD_BYTES
    hint = None
    if much:
        reserve = f"snugpt plan --reserve {held / GIB:.1f}"
        hint = reserve if card.display or not listed else f"{reserve}, or end what is not needed"
    status: Status = "warning" if much else "ok"
    yield Check(name=f"gpu {card.index}", status=status, text=text, hint=hint)
    for process in listed[:MOST_PROCESSES]:
        size = "bytes not told" if process.bytes is None else gib(process.bytes)
        what = "draws" if process.draws else "computes"
        name = process.name or "not visible from here"
        yield Check(
            name="held by", status="ok", text=f"{size}, process {process.pid} ({name}), {what}"
        )
    if much and not listed:
        text = f"{gib(held)} by processes that are not visible from here (a container, Windows)"
        yield Check(name="held by", status="ok", text=text)


def _spill(driver: Driver, on_windows: bool) -> Iterator[Check]:
    """Whether what does not fit goes on silently in the host's memory."""
    number = _version(driver.version)
    if not on_windows or number is None or number < FIRST_SPILLING:
        return
    setting = "" if number >= FIRST_WITH_SETTING else " (from driver 546.01 on)"
    yield Check(
        name="spill",
        status="warning",
        text="this driver moves what the card can't hold to the host's memory without a word:"
        " a run too large goes on many times slower",
        hint=f"{SPILL_ADVICE}: Prefer No Sysmem Fallback{setting}",
    )


def _torch(torch: TorchBuild | None, driver: Driver | None) -> Iterator[Check]:
    if torch is None:
        yield Check(name="torch", status="missing", text="not installed; planning needs none",
                    hint="pip install 'snugpt[train]'")  # fmt: skip
        return
    cards = () if driver is None else driver.cards
    built = "for CPU" if torch.cuda is None else f"for CUDA {torch.cuda[0]}.{torch.cuda[1]}"
    built = f"for ROCm {torch.rocm}" if torch.rocm else built
    text = f"{torch.version} {built}" + (", Triton" if torch.triton else ", no Triton")
    if cards and torch.cuda is None and torch.rocm is None:
        yield Check(name="torch", status="missing", text=f"{text}: it can't use the card",
                    hint="uv pip install --reinstall torch --torch-backend=auto")  # fmt: skip
        return
    known = None if driver is None else driver.cuda
    if torch.cuda is not None and known is not None and torch.cuda[0] > known[0]:
        yield Check(
            name="torch", status="missing",
            text=f"{text}: the driver runs CUDA up to {known[0]}.{known[1]}",
            hint="a newer driver, or: uv pip install --reinstall torch --torch-backend=auto",
        )  # fmt: skip
        return
    yield Check(name="torch", status="ok", text=text)
    for card in cards:
        yield from _kernels(torch, card)


def _kernels(torch: TorchBuild, card: Card) -> Iterator[Check]:
    """Whether the build has kernels for the card, by what the catalogue says of it."""
    try:
        said = find_gpu(card.name).pytorch
    except SnugError:
        text = f"{card.name} is not in the catalogue: whether {torch.version} has its kernels is"
        yield Check(name="kernels", status="ok", text=f"{text} not known")
        return
    if said.startswith(DEFAULT_WHEELS) or torch.cuda is None:
        return
    wanted = f"cu{torch.cuda[0]}{torch.cuda[1]}"
    _, _, command = said.partition(": ")
    if wanted in command:
        return
    text = f"{card.name} is {said.partition(':')[0]}"
    yield Check(name="kernels", status="missing", text=text, hint=command or None)


def _variables(driver: Driver | None) -> Iterator[Check]:
    """Settings in the environment that decide about memory."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver is not None and driver.cards and hidden is not None and hidden.strip() in ("", "-1"):
        yield Check(name="hidden", status="missing",
                    text=f"CUDA_VISIBLE_DEVICES={hidden!r} hides every card",
                    hint="unset CUDA_VISIBLE_DEVICES")  # fmt: skip
    for name in ALLOCATOR_VARIABLES:
        if os.environ.get(name):
            yield Check(name="allocator", status="ok", text=f"{name}={os.environ[name][:60]}")


def _host() -> Iterator[Check]:
    try:
        room = cpu_capacity_bytes()
    except SnugError as error:
        yield Check(name="RAM", status="warning", text=error.message)
        return
    status: Status = "warning" if room < LITTLE_RAM_BYTES else "ok"
    text = f"{gib(room)} for a process (available, and within the container's limit)"
    hint = "end other programs, or give the container more memory" if status != "ok" else None
    yield Check(name="RAM", status=status, text=text, hint=hint)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        if size < LITTLE_SHARED_BYTES:
            yield Check(name="/dev/shm", status="warning",
                        text=f"{gib(size)}: little for loaders with worker processes",
                        hint="docker run --shm-size=8g ...")  # fmt: skip


def _disk(runs: Path) -> Check:
    """The disk that runs are written to: their folder's, or that of where it would be made."""
    place = runs if runs.is_dir() else Path()
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Check(name="disk", status="warning", text=f"{place}: {error.strerror}")
    little = free < LITTLE_DISK_BYTES
    text = f"{gib(free)} free for {runs}/"
    hint = "a plan says what a run keeps: snugpt plan --depth 12" if little else None
    return Check(name="disk", status="warning" if little else "ok", text=text, hint=hint)


def _version(text: str) -> tuple[int, int] | None:
    parts = text.split(".")
    numbers = [int(part) for part in parts[:2] if part.isdecimal()]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None

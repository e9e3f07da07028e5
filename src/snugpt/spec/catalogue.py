"""The GPU catalogue: `gpus.toml` as Gpu objects, and the names people give to them.

A text names a card when its words, split where letters meet digits, are exactly the words of one of
the card's spellings. Vendor words ("NVIDIA", "GeForce", "Tesla", "Apple", "GPU") may be there or
not; case, spaces, hyphens and underscores do not count. There is no prefix or nearest match: a card
that is not in the catalogue ("rtx 4090 d", "a100 20gb") is refused, not taken for its sibling.

Where a plain name covers several cards it is the one with the least memory (`a100` is the 40 GB
one, `v100` the 16 GB one), so that a plan made for it holds on the others too. Exceptions, by
custom: `rtx 3060` is the 12 GB one, `rtx 3050` the 8 GB one, `gtx 1060` the 6 GB one. Plain `h100`
is the 80 GB SXM.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import msgspec

from snugpt.errors import unknown_name
from snugpt.spec.gpu import Backend, Dtype, Gpu
from snugpt.units import GIB, MIB

CATALOGUE_FILE = Path(__file__).with_name("gpus.toml")

_NOISE = frozenset({"nvidia", "geforce", "tesla", "apple", "gpu", "graphics", "card", "vram"})
_SEPARATORS = re.compile(r"[\s_\-/,()®™]+")
_WORD = re.compile(r"[a-z]+|[0-9]+")
_LONGEST_NAME = 80  # characters; the longest driver name known has 40


class _Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One [[gpu]] table of gpus.toml, in the units its sources print."""

    id: str
    name: str
    memory_mib: int
    usable_gib: float
    bandwidth_gb_per_s: float
    tflops: dict[Dtype, float]
    pytorch: str
    sources: tuple[str, ...]
    date: str
    backend: Backend = "cuda"
    capability: tuple[int, int] | None = None
    unified: bool = False
    num_multiprocessors: int | None = None
    pcie: tuple[int, int] | None = None
    host_link_gb_per_s: float | None = None
    nvlink_gb_per_s: float | None = None
    power_w: float | None = None
    aliases: tuple[str, ...] = ()
    recalled: tuple[str, ...] = ()


@cache
def catalogue() -> Mapping[str, Gpu]:
    """Return every card of the catalogue by its id, in the order of the file."""
    return MappingProxyType({gpu.id: gpu for gpu in _read(_text())})


@cache
def card(card_id: str) -> Gpu | None:
    """Return the card of that id, None where there is none; only its own table is read."""
    text, head = _text(), f'\n[[gpu]]\nid = "{card_id}"\n'
    start = text.find(head)
    if start < 0:
        return None
    end = text.find("\n[[gpu]]\n", start + len(head))
    return _read(text[start : end if end > 0 else None])[0]


@cache
def _text() -> str:
    return CATALOGUE_FILE.read_text(encoding="utf-8")


def _read(tables: str) -> list[Gpu]:
    rows = msgspec.convert(tomllib.loads(tables)["gpu"], list[_Row])
    return [_gpu(row) for row in rows]


def find_gpu(text: str) -> Gpu:
    """Return the card that `text` names; raise BadQuestionError when it names none.

    Understands ids (`a100-80gb`), what the driver calls the card ("NVIDIA A100-SXM4-80GB") and what
    people type ("4090", "geforce rtx 3060 12 GB").
    """
    exact = card(text)
    if exact is not None:
        return exact
    words = _words(text) if len(text) <= _LONGEST_NAME else ()
    card_id = _ids_by_words().get(words)
    if card_id is None:
        asked = "-".join(text[:_LONGEST_NAME].lower().split())
        raise unknown_name("GPU", asked, catalogue(), hint="snugpt gpus")
    return catalogue()[card_id]


def _gpu(row: _Row) -> Gpu:
    return Gpu(
        id=row.id,
        name=row.name,
        backend=row.backend,
        memory_bytes=row.memory_mib * MIB,
        usable_bytes=round(row.usable_gib * GIB),
        bandwidth_bytes_per_s=row.bandwidth_gb_per_s * 1e9,
        flops={dtype: rate * 1e12 for dtype, rate in row.tflops.items()},
        capability=row.capability,
        unified=row.unified,
        num_multiprocessors=row.num_multiprocessors,
        pcie=row.pcie,
        host_link_bytes_per_s=_host_link_bytes_per_s(row),
        peer_link_bytes_per_s=_bytes_per_s(row.nvlink_gb_per_s),
        power_w=row.power_w,
        pytorch=row.pytorch,
        aliases=row.aliases,
        sources=row.sources,
        date=row.date,
        recalled=row.recalled,
    )


def _host_link_bytes_per_s(row: _Row) -> float | None:
    """Return what the link to the CPU carries in one direction, None where it is not known.

    PCIe from generation 3 on: 8 GT/s a lane, twice as much with every generation, 128 payload bits
    in 130 (https://intel.com/content/www/us/en/docs/programmable/683111/23-4/
    avalon-st-interface-with-optional-sr.html).
    """
    if row.pcie is None or row.host_link_gb_per_s is not None:
        return _bytes_per_s(row.host_link_gb_per_s)
    generation, lanes = row.pcie
    bits_per_s = 8e9 * 2.0 ** (generation - 3) * lanes * 128 / 130
    return bits_per_s / 8


def _bytes_per_s(gb_per_s: float | None) -> float | None:
    return None if gb_per_s is None else gb_per_s * 1e9


@cache
def _ids_by_words() -> dict[tuple[str, ...], str]:
    return {words: gpu.id for gpu in catalogue().values() for words in _spellings(gpu)}


def _spellings(gpu: Gpu) -> Iterator[tuple[str, ...]]:
    """Yield the word sequences that name this card and no other."""
    for text in (gpu.id, gpu.name, *gpu.aliases):
        words = _words(text)
        yield words
        if words[0] in {"rtx", "gtx"}:  # GeForce numbers are unique without the prefix
            yield from _with_memory(words, gpu)
            yield from _with_memory(words[1:], gpu)


def _with_memory(words: tuple[str, ...], gpu: Gpu) -> Iterator[tuple[str, ...]]:
    """Yield a GeForce spelling as it is, and with its memory size unless it has it already."""
    yield words
    if "gb" not in words:
        yield (*words, str(round(gpu.memory_bytes / GIB)), "gb")


def _words(text: str) -> tuple[str, ...]:
    """Split a name into words: "RTX4090" -> ("rtx", "4090"). A foreign character gives no words."""
    parts = [part for part in _SEPARATORS.split(text.lower()) if part]
    if not all(part.isascii() and part.isalnum() for part in parts):
        return ()
    words = [word for part in parts for word in _WORD.findall(part) if word not in _NOISE]
    return tuple(_gigabytes(words))


def _gigabytes(words: list[str]) -> Iterator[str]:
    """Write every unit of a memory size as "gb": "24 g" and "24 GiB" mean the same product."""
    previous = ""
    for word in words:
        yield "gb" if word in {"g", "gib"} and previous.isdigit() else word
        previous = word

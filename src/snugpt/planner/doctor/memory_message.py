"""Out-of-memory messages of PyTorch, 1.13 and later, and of the driver and libraries under it.

1.13, 2.0   Tried to allocate A (GPU 0; B total capacity; C already allocated; D free; E reserved
            in total by PyTorch)
2.1, 2.2    Tried to allocate A. GPU 0 has a total capacty of B of which D is free. ...
2.3 on      "capacity", private pools, PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
2.9 on      PYTORCH_ALLOC_CONF
MPS         MPS backend out of memory (MPS allocated: A, other allocations: B, max allowed: C)
CPU         DefaultCPUAllocator: can't allocate memory: you tried to allocate N bytes
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from snugpt.planner.doctor.place import place_of
from snugpt.planner.doctor.reading import Line
from snugpt.planner.doctor.report import Backend, OutOfMemory, Place, ProcessUse
from snugpt.units import GIB, KIB, MIB

MOST_LINES = 12  # over which a terminal wraps a message
LARGEST_SIZE = 2**62
# A process that is not said to be this one is, if it holds what the allocator does and the context.
OUTSIDE_PYTORCH_BYTES = 2 * GIB
OUT_OF_MEMORY = re.compile(
    r"\b(CUDA|HIP|XPU|MPS backend)(?: error:)? out(?: of(?: memory|\s*$)|\s*$)"
    r"|DefaultCPUAllocator\b"
    r"|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED"
    r"|^\s*(?:numpy\S*\.)?(?:_ArrayMemoryError|MemoryError)\b"
    # snugpt's own line
    r"|\bout of memory in step \d+ with device_batch_size",
    re.IGNORECASE,
)
_BACKENDS: dict[str, Backend] = {"cuda": "cuda", "hip": "hip", "xpu": "xpu", "mps backend": "mps"}
# MPS wrote GB before it wrote GiB, and meant the same: a 16 GB Mac has "max allowed: 18.13 GB" in
# https://github.com/haoheliu/AudioLDM2/issues/20 and "18.13 GiB" in
# https://github.com/Comfy-Org/ComfyUI/issues/8984.
_UNITS = {"bytes": 1, "byte": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024 * GIB,
          "kb": KIB, "mb": MIB, "gb": GIB, "tb": 1024 * GIB}  # fmt: skip
_SIZE = r"(\d{1,20}(?:\.\d{1,6})?)(bytes?|[KMGT]i?B)"


def _sized(pattern: str) -> re.Pattern[str]:
    """A pattern without its spaces: a terminal that wraps takes some out and puts others in."""
    return re.compile(pattern.replace(" ", "").replace("SIZE", _SIZE), re.IGNORECASE)


_TRIED = _sized(r"(?:Tried to allocate|tried to allocate|Unable to allocate) SIZE")
_CAPACITY = _sized(r"total capaci?ty of SIZE|SIZE total capacity|max allowed: SIZE")
_FREE = _sized(r"of which SIZE is free|; SIZE free")
_ALLOCATED = _sized(
    r"allocated memory SIZE is allocated by PyTorch|SIZE already allocated|MPS allocated: SIZE"
)
_RESERVED = _sized(r"SIZE reserved in total by PyTorch")
_CACHED = _sized(r"SIZE is reserved by PyTorch but unallocated")
_THIS = _sized(r"this process has SIZE memory in use")
_PROCESS = _sized(r"Process (\d{1,10}) has SIZE memory in use")
_ELSEWHERE = _sized(r"other allocations: SIZE")
_LIMIT = _sized(r"SIZE allowed;")
_DEVICE = re.compile(r"GPU(\d{1,4})(?!\d)")
_VARIABLE = re.compile(r"PYTORCH_(?:CUDA_|HIP_)?ALLOC_CONF")
_NEXT = re.compile(r"out of memory|Traceback \(|^\s*File \"", re.IGNORECASE)


def out_of_memory(lines: Sequence[Line], at: int) -> OutOfMemory:
    """Return the report whose first line is `lines[at]`."""
    text = "".join("".join(_message(lines, at)).split())
    return _read(text, lines[at], at, place_of(lines, at))


def _read(text: str, first: Line, at: int, place: Place) -> OutOfMemory:
    head = OUT_OF_MEMORY.search(first.text)
    named = (head[1] or "").lower() if head else ""
    backend = _BACKENDS.get(named, "cuda" if head and "_STATUS_" in head[0] else "cpu")
    if head and "device_batch_size" in head[0]:
        backend = "cuda"  # snugpt says it of either; its plan knows
    allocated, reserved = _size(_ALLOCATED, text), _size(_RESERVED, text)
    cached = _size(_CACHED, text)
    if cached is None and reserved is not None and allocated is not None:
        cached = max(0, reserved - allocated)
    process, others = _processes(text, allocated, cached)
    capacity, free = _size(_CAPACITY, text), _size(_FREE, text)
    elsewhere = _size(_ELSEWHERE, text)
    if capacity is not None and allocated is not None and elsewhere is not None:  # MPS
        process = allocated + elsewhere
        free = max(0, capacity - process)
    device = _DEVICE.search(text)
    return OutOfMemory(
        backend=backend,
        line=at,
        rank=first.rank,
        device=int(device[1]) if device else None,
        tried_bytes=_size(_TRIED, text),
        capacity_bytes=capacity,
        free_bytes=free,
        allocated_bytes=allocated,
        cached_bytes=cached,
        process_bytes=process,
        others=others,
        limit_bytes=_size(_LIMIT, text),
        setting=_setting(text),
        place=place,
    )


def _message(lines: Sequence[Line], at: int) -> list[str]:
    """The message's line and those of the same rank that go on with it."""
    rank, parts = lines[at].rank, [lines[at].text]
    for line in lines[at + 1 : at + 8 * MOST_LINES]:
        if line.rank != rank:
            continue
        if _NEXT.search(line.text) or len(parts) == MOST_LINES:
            break
        parts.append(line.text)
    return parts


def _setting(text: str) -> str | None:
    """The allocator's variable against fragmentation, as this version of PyTorch spells it."""
    if "totalcapacity;" in text:  # before 2.1 there are no expandable segments
        return "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:512"
    named = _VARIABLE.search(text)
    return f"{named[0]}=expandable_segments:True" if named else None


def _size(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    if found is None:
        return None
    number, unit = [group for group in found.groups() if group is not None][:2]
    return _bytes(number, unit)


def _bytes(number: str, unit: str) -> int:
    return min(LARGEST_SIZE, round(float(number) * _UNITS[unit.lower()]))


def _processes(
    text: str, allocated: int | None, cached: int | None
) -> tuple[int | None, tuple[ProcessUse, ...]]:
    """This process's bytes, and the others'.

    In a container PyTorch does not know its own number and lists itself as one more process: it is
    the one that holds as much as the allocator and little beside.
    """
    this = _size(_THIS, text)
    listed = [
        ProcessUse(int(pid), _bytes(number, unit)) for pid, number, unit in _PROCESS.findall(text)
    ]
    if this == 0 and allocated:  # said where the driver does not count by process
        this = None
    if this is None and allocated is not None:
        reserved = allocated + (cached or 0)
        own = [
            use
            for use in listed
            if reserved - 16 * MIB <= use.bytes <= reserved + OUTSIDE_PYTORCH_BYTES
        ]
        if own:
            mine = min(own, key=lambda use: use.bytes)
            return mine.bytes, tuple(use for use in listed if use is not mine)
    return this, tuple(listed)

"""What a snapshot's history began with: its events are undone one by one from the end.

The file holds the memory as it was at last. An allocation undone is a block less, a free undone is
a block more, and so for segments and mapped pages. What then is left was there before the first
event that was kept (the history is a ring: PyTorch drops the oldest).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field, replace

from snugpt.estimate.allocator import (
    LARGE_SEGMENT,
    MIN_BLOCK,
    SMALL_REQUEST,
    SMALL_SEGMENT,
)
from snugpt.estimate.blocks import PoolKey, Stretch
from snugpt.estimate.snapshot import Frame, Snapshot, SnapshotEvent
from snugpt.units import round_up


@dataclass(frozen=True, slots=True)
class Resident:
    """A block that was there before the first event."""

    address: int
    size: int
    requested_bytes: int
    awaiting: bool  # freed already, still used by another stream
    frames: tuple[Frame, ...]
    inferred: bool = False  # its size is only what was asked for


@dataclass(slots=True)
class Beginning:
    """Memory and blocks before the first event, and how often the history contradicts the end."""

    memory: dict[PoolKey, list[Stretch]] = field(default_factory=dict)
    blocks: dict[PoolKey, list[Resident]] = field(default_factory=dict)
    contradictions: int = 0
    inferred: int = 0  # blocks that may have had a rest that was not split off

    @property
    def reserved_bytes(self) -> int:
        """What the allocator held."""
        return sum(size for stretches in self.memory.values() for _, size in stretches)


def key_of_memory(event: SnapshotEvent, expandable: bool) -> PoolKey:
    """The pool that a segment or mapped pages belong to.

    An event does not say it. Segments of the small pool have 2 MiB and others more. A small request
    maps one page of 2 MiB, a large one pages of 20 MiB.
    """
    if expandable:
        small = event.size % LARGE_SEGMENT != 0
    else:
        small = event.size == SMALL_SEGMENT
    return PoolKey(small, event.stream, event.pool_id)


def beginning(snapshot: Snapshot) -> Beginning:
    """Return what was there before the first event."""
    undo = _Undo(snapshot)
    for event in reversed(snapshot.events):
        undo.event(event)
    return undo.result()


class _Undo:
    def __init__(self, snapshot: Snapshot) -> None:
        self._expandable = snapshot.expandable
        self._memory: dict[int, tuple[int, PoolKey]] = {}
        self._live: dict[int, Resident] = {}
        self._contradictions = 0
        for segment in snapshot.segments:
            self._memory[segment.address] = segment.total_size, segment.pool
            for block in segment.blocks:
                if block.state != "inactive":
                    awaiting = block.state != "active_allocated"
                    self._live[block.address] = Resident(
                        block.address, block.size, block.requested_size, awaiting, block.frames
                    )

    def event(self, event: SnapshotEvent) -> None:
        match event.action:
            case "alloc":
                if self._live.pop(event.addr, None) is None:
                    self._contradictions += 1
            case "free_completed":
                self._add(event, awaiting=True)
            case "free_requested":
                self._add(event, awaiting=False)
            case "segment_alloc" | "segment_map":
                self._remove_memory(event.addr, event.size)
            case "segment_free" | "segment_unmap":
                key = key_of_memory(event, self._expandable)
                self._add_memory(event.addr, event.size, key)

    def result(self) -> Beginning:
        found = Beginning(contradictions=self._contradictions)
        left = sorted(self._live)
        end = 0
        for address, (size, key) in sorted(self._memory.items()):
            if address < end:
                found.contradictions += 1
                continue
            end = address + size
            found.memory.setdefault(key, []).append((address, size))
        taken = 0
        for key, stretches in found.memory.items():
            for start, size in stretches:
                first, last = bisect_left(left, start), bisect_left(left, start + size)
                inside = [self._live[address] for address in left[first:last]]
                taken += len(inside)
                splits_all = key.small or self._expandable
                found.blocks.setdefault(key, []).extend(_fill(inside, start + size, splits_all))
                found.inferred += 0 if splits_all else sum(block.inferred for block in inside)
        found.contradictions += len(left) - taken  # blocks where no memory is known
        return found

    def _add(self, event: SnapshotEvent, *, awaiting: bool) -> None:
        known = self._live.get(event.addr)
        if known is None:
            size = round_up(max(event.size, 1), MIN_BLOCK)
            known = Resident(event.addr, size, event.size, awaiting, event.frames, inferred=True)
        elif awaiting or not known.awaiting:
            self._contradictions += 1  # freed while it was in use already
        self._live[event.addr] = replace(known, awaiting=awaiting)

    def _add_memory(self, address: int, size: int, key: PoolKey) -> None:
        """Pages beside pages are one stretch; segments beside segments are two."""
        if self._expandable:
            for start, (length, beside) in list(self._memory.items()):
                if beside == key and (start + length == address or address + size == start):
                    del self._memory[start]
                    address, size = min(start, address), size + length
        self._memory[address] = size, key

    def _remove_memory(self, address: int, size: int) -> None:
        known = self._memory.get(address)
        if known is not None and known[0] == size:
            del self._memory[address]
            return
        for start, (length, key) in list(self._memory.items() if self._expandable else ()):
            if start <= address and address + size <= start + length:
                del self._memory[start]
                if start < address:
                    self._memory[start] = address - start, key
                if address + size < start + length:
                    self._memory[address + size] = start + length - address - size, key
                return
        self._contradictions += 1


def _fill(blocks: list[Resident], end: int, splits_all: bool) -> list[Resident]:
    """Give each block the rest that was not split from it.

    A free is recorded with the bytes asked for. In the large pool of the native allocator a free
    block is above 1 MiB, so a shorter gap behind a block is its own. Of a longer gap the part that
    is its own is not known; none of it is assumed.
    """
    found: list[Resident] = []
    for index, block in enumerate(blocks):
        limit = blocks[index + 1].address if index + 1 < len(blocks) else end
        gap = limit - block.address - block.size
        size = block.size
        if gap < 0:
            size = limit - block.address
        elif not splits_all and gap <= SMALL_REQUEST:
            size += gap
        found.append(replace(block, size=size))
    return found

"""PyTorch's CUDA caching allocator, simulated: what a timeline makes it allocate and reserve.

Rules and constants from c10/core/AllocatorConfig.h and c10/cuda/CUDACachingAllocator.cpp (PyTorch
2.13), the default native allocator without expandable segments:

- a request is rounded up to 512 bytes; up to 1 MiB the small pool serves it, else the large one;
- a pool is searched for the smallest free block that holds it, lowest address first;
- failing that a segment is taken from the driver: 2 MiB for small requests, 20 MiB for those below
  10 MiB, else the request rounded up to 2 MiB;
- a block is split if at least 512 bytes (small pool) or more than 1 MiB (large pool) would be left;
- a freed block is merged with its free neighbours. Segments are kept until memory runs out.

Never validated on a GPU yet. The unsplit rest of a block is counted as allocated (slack).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from snugpt.estimate.operations import Buffer
from snugpt.estimate.timeline import Segment, Timeline
from snugpt.units import MIB

SMALL_REQUEST = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_REQUEST = 10 * MIB
LARGE_SEGMENT = 20 * MIB
ROUND_SEGMENT = 2 * MIB
MIN_BLOCK = 512


class Allocation(NamedTuple):
    """Peaks by the allocator's own counters, in bytes."""

    allocated_bytes: int
    reserved_bytes: int


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of a segment; `before` and `after` are its neighbours in the segment."""

    address: int
    size: int
    small: bool
    free: bool = False
    before: Block | None = None
    after: Block | None = None


class CachingAllocator:
    """Allocates and frees by PyTorch's rules; `allocated`, `reserved` and their peaks in bytes."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}
        self._segments = count()

    def allocate(self, num_bytes: int) -> Block:
        """Return a block that holds `num_bytes`, which must be above 0."""
        size = -(-num_bytes // MIN_BLOCK) * MIN_BLOCK
        small = size <= SMALL_REQUEST
        block = self._best_fit(size, small) or self._new_segment(size, small)
        rest = block.size - size
        if rest >= MIN_BLOCK if small else rest > SMALL_REQUEST:
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """Free a block and merge it with its free neighbours."""
        self.allocated -= block.size
        block.free = True
        before, after = block.before, block.after
        if before is not None and before.free:
            self._forget(before)
            block.address, block.size = before.address, block.size + before.size
            block.before = before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.free:
            self._forget(after)
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        insort(self._free[block.small], (block.size, block.address, block))

    def _best_fit(self, size: int, small: bool) -> Block | None:
        pool = self._free[small]
        index = bisect_left(pool, (size,))
        return pool.pop(index)[2] if index < len(pool) else None

    def _new_segment(self, size: int, small: bool) -> Block:
        if small:
            total = SMALL_SEGMENT
        elif size < LARGE_REQUEST:
            total = LARGE_SEGMENT
        else:
            total = -(-size // ROUND_SEGMENT) * ROUND_SEGMENT
        self.reserved += total
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return Block(next(self._segments) << 48, total, small)

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.small, True, block, block.after)
        if rest.after is not None:
            rest.after.before = rest
        block.after, block.size = rest, size
        insort(self._free[rest.small], (rest.size, rest.address, rest))

    def _forget(self, block: Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]


def simulate(timeline: Timeline, batch: int) -> Allocation:
    """Play the first step and a second one; return the peaks.

    In the first the optimizer state does not exist until the optimizer's phase, where it falls into
    whatever the activations left free. That is what fragments a real run.
    """
    player = _Player(timeline, batch)
    late = [b for b in timeline.resident if b.category == "optimizer"]
    player.hold(b for b in timeline.resident if b.category != "optimizer")
    for phase, _, segment in timeline.placed:
        if late and phase == "optimizer":
            player.hold(late)
            late = []
        player.play(segment)
    for _, _, segment in timeline.placed:
        player.play(segment)
    return Allocation(player.allocator.peak_allocated, player.allocator.peak_reserved)


class _Player:
    """Plays segments on an allocator. Which blocks a buffer holds is a list of its own, so that a
    segment placed in many layers is turned into (sign, list, bytes) once."""

    def __init__(self, timeline: Timeline, batch: int) -> None:
        self.allocator = CachingAllocator()
        self._timeline, self._batch = timeline, batch
        self._blocks: dict[Buffer, list[Block]] = {}
        self._parts: dict[Segment, list[tuple[int, list[Block], int]]] = {}

    def hold(self, buffers: Iterable[Buffer]) -> None:
        """Allocate buffers that stay."""
        for buffer in buffers:
            num_bytes = self._timeline.bytes_of(buffer, self._batch)
            if num_bytes:
                self._held(buffer).append(self.allocator.allocate(num_bytes))

    def play(self, segment: Segment) -> None:
        """Allocate and free what a segment does, in its order."""
        parts = self._parts.get(segment)
        if parts is None:
            parts = self._parts[segment] = [
                (sign, self._held(buffer), self._timeline.bytes_of(buffer, self._batch))
                for sign, buffer in segment.events
            ]
        allocate, release = self.allocator.allocate, self.allocator.release
        for sign, blocks, num_bytes in parts:
            if sign > 0:
                if num_bytes:
                    blocks.append(allocate(num_bytes))
            elif blocks:
                release(blocks.pop())

    def _held(self, buffer: Buffer) -> list[Block]:
        return self._blocks.setdefault(self._timeline.aliases.get(buffer, buffer), [])

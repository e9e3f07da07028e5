"""A timeline played on the simulated allocator: what it allocates and what it reserves."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from snugpt.estimate.allocator import CachingAllocator, OutOfMemoryError
from snugpt.estimate.blocks import Block
from snugpt.estimate.expandable import ExpandableAllocator
from snugpt.estimate.operations import Buffer
from snugpt.estimate.timeline import Segment, Timeline


class Allocation(NamedTuple):
    """Peaks by the allocator's own counters, in bytes, and what became of it where memory ends."""

    allocated_bytes: int
    reserved_bytes: int
    alloc_retries: int = 0  # times that the cache had to go back to the driver
    out_of_memory: bool = False  # the peaks then are those up to the request that failed


def simulate(
    timeline: Timeline,
    batch: int,
    *,
    expandable: bool = False,
    capacity_bytes: int | None = None,
) -> Allocation:
    """Play the first step and a second one; return the peaks.

    In the first the optimizer state does not exist until the optimizer's phase, where it falls into
    whatever the activations left free. That is what fragments a real run. A step without such a
    phase updates in backward; its state is made before. `capacity_bytes` is what
    the driver can hand out; without it there is no end.
    """
    allocator = (ExpandableAllocator if expandable else CachingAllocator)(capacity_bytes)
    with suppress(OutOfMemoryError):
        _play(timeline, _Player(timeline, batch, allocator))
    return Allocation(
        allocator.peak_allocated,
        allocator.peak_reserved,
        allocator.alloc_retries,
        allocator.ooms > 0,
    )


def _play(timeline: Timeline, player: _Player) -> None:
    made_late = any(placed.phase == "optimizer" for placed in timeline.placed)
    late = [b for b in timeline.resident if b.category == "optimizer" and made_late]
    player.hold(b for b in timeline.resident if b.category != "optimizer" or not made_late)
    for phase, _, segment in timeline.placed:
        if late and phase == "optimizer":
            player.hold(late)
            late = []
        player.play(segment)
    for _, _, segment in timeline.placed:
        player.play(segment)


class _Player:
    """Plays segments on an allocator. Which blocks a buffer holds is a list of its own, so that a
    segment placed in many layers is turned into (sign, list, bytes) once."""

    def __init__(self, timeline: Timeline, batch: int, allocator: CachingAllocator) -> None:
        self.allocator = allocator
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

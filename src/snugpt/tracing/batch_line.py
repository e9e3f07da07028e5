"""From timelines of two batch sizes to one that holds for every batch.

Code that treats sequences alike does the same at every batch size, event for event, and each
tensor's bytes are a line over it. Two traces give the lines; a third checks them.
"""

from __future__ import annotations

from collections.abc import Iterator

from snugpt.estimate.operations import Buffer
from snugpt.estimate.timeline import Event, Placed, Segment, Timeline


def line_through(
    first: Timeline, first_batch: int, second: Timeline, second_batch: int
) -> Timeline | None:
    """Return the timeline over the batch; None where the two differ in more than sizes."""
    lines: dict[Buffer, tuple[Buffer, Buffer]] = {}  # of the first -> of the second, and both
    apart = second_batch - first_batch

    def line(one: Buffer, other: Buffer) -> Buffer | None:
        found = lines.get(one)
        if found is not None:
            return found[1] if found[0] is other else None
        slope, rest = divmod(other.fixed_bytes - one.fixed_bytes, apart)
        if rest:
            return None
        fixed = one.fixed_bytes - slope * first_batch
        both = Buffer(one.name, one.category, fixed, slope, f"{fixed:,} + B·{slope:,}")
        lines[one] = other, both
        return both

    if not _alike(first, second):
        return None
    resident = [line(*pair) for pair in zip(first.resident, second.resident, strict=True)]
    placed = []
    for one, other in zip(first.placed, second.placed, strict=True):
        events = []
        for (sign, ours), (_, theirs) in zip(one.segment.events, other.segment.events, strict=True):
            both = line(ours, theirs)
            if both is None:
                return None
            events.append(Event(sign, both))
        placed.append(Placed(one.phase, one.layer, Segment(events, first.block_bytes)))
    if None in resident:
        return None
    return Timeline(tuple(resident), tuple(placed), first.block_bytes)  # type: ignore[arg-type]


def holds_at(line: Timeline, batch: int, traced: Timeline) -> bool:
    """Whether the line gives every tensor of another trace its bytes."""
    return _alike(line, traced) and all(
        ours.fixed_bytes + batch * ours.sequence_bytes == theirs.fixed_bytes
        for ours, theirs in zip(_buffers(line), _buffers(traced), strict=True)
    )


def _alike(one: Timeline, other: Timeline) -> bool:
    """Whether the same happens in the same order, sizes left aside."""
    return len(one.resident) == len(other.resident) and _signs(one) == _signs(other)


def _signs(timeline: Timeline) -> list[tuple[str, list[int]]]:
    return [
        (placed.phase, [event.sign for event in placed.segment.events])
        for placed in timeline.placed
    ]


def _buffers(timeline: Timeline) -> Iterator[Buffer]:
    yield from timeline.resident
    for _, _, event in timeline.events():
        yield event.buffer

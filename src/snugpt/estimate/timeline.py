"""The timeline: allocations and frees in order, and its one reader.

A step repeats the same layer many times, so events are grouped in segments: each kind of layer is
walked once, and a timeline places its segment once per layer. A segment knows what it leaves behind
and its *crests*, the sizes at which its memory stands highest; both are linear in the batch,
`fixed + batch * per_sequence`. The peak of a whole step is then the highest of a few lines, so
another batch is arithmetic and the largest batch a division. Only a plan that is printed is spelled
out event by event.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from snugpt.estimate.operations import Buffer
from snugpt.spec.memory import Phase


class Line(NamedTuple):
    """Bytes as a line over the batch: `fixed + batch * per_sequence`."""

    fixed: int
    per_sequence: int

    def at(self, batch: int) -> int:
        """The bytes at one batch size."""
        return self.fixed + batch * self.per_sequence


class Event(NamedTuple):
    """`sign` is +1 where the buffer is allocated and -1 where it is freed."""

    sign: int
    buffer: Buffer


class Segment:
    """Events that happen together, and what they come to; made once and placed often."""

    def __init__(self, events: Iterable[Event], block_bytes: int) -> None:
        self.events = tuple(events)
        self.net, self.crests = _summary(self.events, block_bytes)


class Placed(NamedTuple):
    """A segment at its place in the step: phase, and layer (-1 before, L behind the layers)."""

    phase: Phase
    layer: int
    segment: Segment


class Alive(NamedTuple):
    """What is alive at an instant: how many of each buffer, and when it is."""

    bytes: int
    phase: Phase
    buffers: dict[Buffer, int]


@dataclass(frozen=True, eq=False)
class Timeline:
    """One step: what lies in memory before it, and what happens then.

    In an `abridged` phase one repetition stands for many that are alike: a chunk of the loss, the
    update of a matrix. Its peak is right, its list of events is not complete.
    """

    resident: tuple[Buffer, ...]
    placed: tuple[Placed, ...]
    block_bytes: int
    aliases: dict[Buffer, Buffer] = field(default_factory=dict)  # one tensor under two names
    abridged: frozenset[Phase] = frozenset()
    host: tuple[Buffer, ...] = ()  # what a lever puts in host memory; no event speaks of it

    @cached_property
    def envelope(self) -> tuple[Line, ...]:
        """The lines of which one is the peak at any batch from 1 up."""
        return _envelope(line for lines in self.crests.values() for line in lines)

    @cached_property
    def crests(self) -> dict[Phase, tuple[Line, ...]]:
        """The highest instants of each phase, as lines over the batch."""
        fixed = sum(_rounded(b.fixed_bytes, self.block_bytes) for b in self.resident)
        per_sequence = sum(_rounded(b.sequence_bytes, self.block_bytes) for b in self.resident)
        found: dict[Phase, set[Line]] = {}
        for phase, _, segment in self.placed:
            lines = found.setdefault(phase, set())
            for crest in segment.crests:
                lines.add(Line(fixed + crest.fixed, per_sequence + crest.per_sequence))
            fixed += segment.net.fixed
            per_sequence += segment.net.per_sequence
        return {phase: _envelope(lines) for phase, lines in found.items()}

    def peak_bytes(self, batch: int) -> int:
        """The most bytes alive at once, from the envelope.

        Exact where a tensor's bytes per sequence are whole blocks (on CUDA: T a multiple of 256),
        a few KiB per tensor too much elsewhere.
        """
        return max(fixed + batch * slope for fixed, slope in self.envelope)

    def events(self) -> Iterator[tuple[Phase, int, Event]]:
        """Every event of the step in order, with its phase and layer."""
        for phase, layer, segment in self.placed:
            for event in segment.events:
                yield phase, layer, event

    def read(self, batch: int, *, workspace: bool = True) -> tuple[Alive, dict[Phase, int]]:
        """Spell the step out: what is alive at the peak, and the peak of each phase, to the byte.

        Without `workspace` the scratch inside kernels is left out, which gives the requested bytes.
        """
        sizes: dict[Buffer, int] = {}
        alive = start = sum(self._bytes(b, batch, sizes, workspace) for b in self.resident)
        peak, peak_at, phases = start, 0, dict.fromkeys((p.phase for p in self.placed), 0)
        index = 0
        for phase, _, segment in self.placed:
            highest = alive
            for sign, buffer in segment.events:
                size = sizes.get(buffer)
                if size is None:
                    size = self._bytes(buffer, batch, sizes, workspace)
                index += 1
                alive += sign * size
                if alive > highest:
                    highest = alive
                    if alive > peak:
                        peak, peak_at = alive, index
            phases[phase] = max(phases[phase], highest)
        return self._alive_at(peak_at, peak, workspace), phases

    def bytes_of(self, buffer: Buffer, batch: int) -> int:
        """The bytes of one buffer at a batch size, rounded as the backend rounds."""
        return _rounded(buffer.fixed_bytes + batch * buffer.sequence_bytes, self.block_bytes)

    def _bytes(self, buffer: Buffer, batch: int, sizes: dict[Buffer, int], workspace: bool) -> int:
        counted = workspace or buffer.category != "workspace"
        size = buffer.fixed_bytes + batch * buffer.sequence_bytes
        return sizes.setdefault(buffer, _rounded(size, self.block_bytes) if counted else 0)

    def _alive_at(self, peak_at: int, peak: int, workspace: bool) -> Alive:
        """Count what is alive after the first `peak_at` events."""
        buffers: dict[Buffer, int] = {}
        for buffer in self.resident:
            buffers[buffer] = buffers.get(buffer, 0) + 1
        last: Phase = self.placed[0].phase
        for index, (phase, _, (sign, buffer)) in enumerate(self.events(), 1):
            if index > peak_at:
                break
            last = phase
            tensor = self.aliases.get(buffer, buffer)
            buffers[tensor] = buffers.get(tensor, 0) + sign
        counted = {
            b: n for b, n in buffers.items() if n and (workspace or b.category != "workspace")
        }
        return Alive(peak, last, counted)


def _rounded(num_bytes: int, block_bytes: int) -> int:
    return -(-num_bytes // block_bytes) * block_bytes


def _summary(events: tuple[Event, ...], block_bytes: int) -> tuple[Line, tuple[Line, ...]]:
    """What events leave behind, and their crests: the sizes before a free that follows growth."""
    fixed = per_sequence = 0
    crests = {Line(0, 0)}
    rising = False
    for sign, buffer in events:
        if sign < 0 and rising:
            crests.add(Line(fixed, per_sequence))
        rising = sign > 0
        # `_rounded`, spelled out: a search sums up a million events
        fixed -= sign * (-buffer.fixed_bytes // block_bytes) * block_bytes
        per_sequence -= sign * (-buffer.sequence_bytes // block_bytes) * block_bytes
    crests.add(Line(fixed, per_sequence))
    return Line(fixed, per_sequence), _envelope(crests)


def _envelope(lines: Iterable[Line]) -> tuple[Line, ...]:
    """The lines that are highest somewhere from a batch of 1 up: the upper hull, flattest first."""
    hull: list[Line] = []
    steepest_first = sorted(set(lines), key=lambda line: (line.per_sequence, line.fixed))
    for line in steepest_first:
        while hull and (
            hull[-1].at(1) <= line.at(1) or (len(hull) > 1 and _hidden(hull[-2], hull[-1], line))
        ):
            hull.pop()
        hull.append(line)
    return tuple(hull)


def _hidden(flat: Line, middle: Line, steep: Line) -> bool:
    """Whether `middle` is nowhere above both a flatter and a steeper line."""
    rise_middle, rise_steep = (
        middle.per_sequence - flat.per_sequence,
        steep.per_sequence - flat.per_sequence,
    )
    return (flat.fixed - middle.fixed) * rise_steep >= (flat.fixed - steep.fixed) * rise_middle

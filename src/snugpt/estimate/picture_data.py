"""What the picture shows of a timeline: bytes after each event, thinned out, phases side by side.

A step has thousands of events and a picture some hundred columns. Each column shows the highest
instant that falls into it, so every peak is there to the byte; what dips between two of them within
one column is not shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from snugpt.estimate.operations import Buffer
from snugpt.estimate.timeline import Timeline
from snugpt.spec.memory import Category, Phase

# From the bottom of the stack to its top: what stays, then what comes and goes.
STACKED: tuple[Category, ...] = (
    "weights", "optimizer", "gradients", "kv_cache", "batch", "communication", "activations",
    "logits", "workspace", "slack", "unknown",
)  # fmt: skip
LABEL_SHARE = 0.8  # of the width, at most, is given out by the length of the phases' names

StretchKey = tuple[Phase, int]  # a phase, and the how many'th time it comes in this step


class Stretch(NamedTuple):
    """Instants `start` to before `stop`, one phase without interruption."""

    key: StretchKey
    start: int
    stop: int


class Span(NamedTuple):
    """Where something lies on the x axis, in whole points, so that thin columns stay sharp."""

    left: int
    right: int


class Column(NamedTuple):
    """One step of a stepped line: where it lies, and the instant that it shows."""

    span: Span
    instant: int


@dataclass(frozen=True, slots=True)
class Series:
    """Bytes alive at each instant: before the first event, and after each."""

    totals: Sequence[int]
    stretches: tuple[Stretch, ...]

    @property
    def peak_at(self) -> int:
        """The first of the highest instants."""
        return self.totals.index(max(self.totals))

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once."""
        return max(self.totals)

    @property
    def peak_phase(self) -> Phase:
        """The phase of the peak."""
        peak_at = self.peak_at
        return next(s.key[0] for s in self.stretches if s.start <= peak_at < s.stop)

    @property
    def num_repeats(self) -> int:
        """How often the phase that comes most often comes."""
        return max(time for (_, time), _, _ in self.stretches)

    def highest_by_phase(self) -> dict[Phase, int]:
        """The highest instant of each phase, in the order of the step."""
        found: dict[Phase, int] = {}
        for (phase, _), start, stop in self.stretches:
            found[phase] = max(found.get(phase, 0), *self.totals[start:stop])
        return found


def series(timeline: Timeline, batch: int) -> Series:
    """Spell a timeline out at one batch size; kernels' workspaces count."""
    sizes: dict[Buffer, int] = {}
    totals = [sum(timeline.bytes_of(b, batch) for b in timeline.resident)]
    ends: list[tuple[Phase, int]] = []
    for phase, _, segment in timeline.placed:
        for sign, buffer in segment.events:
            size = sizes.get(buffer)
            if size is None:
                size = sizes[buffer] = timeline.bytes_of(buffer, batch)
            totals.append(totals[-1] + sign * size)
        if ends and ends[-1][0] == phase:
            ends.pop()
        ends.append((phase, len(totals)))
    return Series(totals, _stretches(ends))


def _stretches(ends: Sequence[tuple[Phase, int]]) -> tuple[Stretch, ...]:
    found: list[Stretch] = []
    times: dict[Phase, int] = {}
    start = 0
    for phase, stop in ends:
        if stop > start:
            times[phase] = times.get(phase, 0) + 1
            found.append(Stretch((phase, times[phase]), start, stop))
        start = stop
    return tuple(found)


def folded(shown: Series, like: Series) -> Series:
    """Bring a series with more micro-steps down to as many as another has.

    A prediction walks two of them, which stand for all. In the place of its last one comes the
    highest of those that are left, phase by phase.
    """
    wanted = Counter(s.key[0] for s in like.stretches)
    kept: dict[StretchKey, Stretch] = {}
    for (phase, time), start, stop in shown.stretches:
        key = phase, min(time, wanted.get(phase, time))
        present = kept.get(key)
        higher = present is None or max(shown.totals[start:stop]) > max(
            shown.totals[present.start : present.stop]
        )
        if higher:
            kept[key] = Stretch(key, start, stop)
    return Series(shown.totals, tuple(kept.values()))


def stacks(timeline: Timeline, batch: int, instants: set[int]) -> dict[int, tuple[int, ...]]:
    """The bytes of each category of STACKED at some instants."""
    place = {category: i for i, category in enumerate(STACKED)}
    alive = [0] * len(STACKED)
    for buffer in timeline.resident:
        alive[place[buffer.category]] += timeline.bytes_of(buffer, batch)
    found = {0: tuple(alive)} if 0 in instants else {}
    for index, (_, _, (sign, buffer)) in enumerate(timeline.events(), 1):
        tensor = timeline.aliases.get(buffer, buffer)
        alive[place[tensor.category]] += sign * timeline.bytes_of(buffer, batch)
        if index in instants:
            found[index] = tuple(alive)
    return found


def spans(
    first: Series, second: Series | None, whole: Span, label_width: Callable[[Phase], float]
) -> dict[StretchKey, Span]:
    """Give each stretch of two series its place on one x axis, the same place for both.

    A stretch gets room for its name and a share of the rest by its number of events. What only the
    second has stands where it comes in the second.
    """
    counts = {s.key: s.stop - s.start for s in first.stretches}
    order = list(counts)
    behind = 0
    for key, start, stop in second.stretches if second is not None else ():
        if key in counts:
            behind = max(behind, order.index(key) + 1)
        else:
            order.insert(behind, key)
            counts[key] = stop - start
            behind += 1
    width = whole.right - whole.left
    needed = {key: label_width(key[0]) for key in order}
    shrink = min(1.0, LABEL_SHARE * width / sum(needed.values()))
    per_event = (width - shrink * sum(needed.values())) / sum(counts.values())
    found: dict[StretchKey, Span] = {}
    at: float = whole.left
    for key in order:
        left, at = at, at + shrink * needed[key] + per_event * counts[key]
        found[key] = Span(round(left), round(at))
    return found


def columns(shown: Series, places: dict[StretchKey, Span]) -> list[Column]:
    """Thin a series out: columns of at least one point, each with its highest instant."""
    found: list[Column] = []
    for key, start, stop in shown.stretches:
        left, right = places[key]
        number = max(1, min(stop - start, right - left))
        edges = [start + (stop - start) * i // number for i in range(number + 1)]
        for i in range(number):
            inside = range(edges[i], edges[i + 1])
            span = Span(*(left + (right - left) * (i + j) // number for j in (0, 1)))
            found.append(Column(span, max(inside, key=shown.totals.__getitem__)))
    return found

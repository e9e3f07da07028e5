"""Two timelines of one step, side by side: phase by phase, kind by kind, and where they part.

Predicted stands beside traced or recorded. They are made from different things, the operations in
`stacks/` and the code that runs, so that where they agree neither is likely to be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, zip_longest

from snugpt.estimate.operations import Buffer
from snugpt.estimate.timeline import Alive, Event, Timeline
from snugpt.spec.memory import Category, Phase

SCALAR_BYTES = 512  # one block of CUDA's allocator
Stretch = tuple[Phase, int]  # a phase, and how often it began before


@dataclass(frozen=True, slots=True)
class Pair:
    """The same figure from both sides, in bytes."""

    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        """Predicted ÷ measured; 1 where both are nothing."""
        if self.measured == 0:
            return 1.0 if self.predicted == 0 else float("inf")
        return self.predicted / self.measured


@dataclass(frozen=True, slots=True)
class Step:
    """One event as it is shown: +bytes or -bytes, and the name of the tensor."""

    bytes: int
    name: str


@dataclass(frozen=True, slots=True)
class Parting:
    """The first event that differs: in which phase, after how many, and what each side does."""

    phase: Phase
    index: int
    predicted: Step | None
    measured: Step | None


@dataclass(frozen=True, slots=True)
class Term:
    """What is alive at the peaks under one name of the prediction, and the line that made it."""

    name: str
    bytes: Pair
    made_in: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Peaks of the requested bytes, kernels' own scratch left out."""

    peak: Pair
    phases: dict[Phase, Pair]
    categories: dict[Category, Pair]  # alive at each side's own peak
    terms: tuple[Term, ...]  # the same by name, largest first
    predicted_phase: Phase
    measured_phase: Phase
    in_short: tuple[Phase, ...]  # phases that one side tells in short
    num_events: int  # of the prediction in all others
    parting: Parting | None


def compare(
    predicted: Timeline,
    batch: int,
    measured: Timeline,
    measured_batch: int = 1,
    *,
    smallest_bytes: int = SCALAR_BYTES,
) -> Comparison:
    """Compare two timelines; events up to `smallest_bytes` do not count as a parting of ways."""
    ours, our_phases = predicted.read(batch, workspace=False)
    theirs, their_phases = measured.read(measured_batch, workspace=False)
    one = _by_category(predicted, batch, ours)
    other = _by_category(measured, measured_batch, theirs)
    kinds = sorted({*one, *other}, key=lambda kind: -max(one.get(kind, 0), other.get(kind, 0)))
    phases = dict.fromkeys((*our_phases, *their_phases))
    return Comparison(
        peak=Pair(ours.bytes, theirs.bytes),
        phases={p: Pair(our_phases.get(p, 0), their_phases.get(p, 0)) for p in phases},
        categories={kind: Pair(one.get(kind, 0), other.get(kind, 0)) for kind in kinds},
        terms=_terms(predicted, batch, ours, measured, measured_batch, theirs),
        predicted_phase=ours.phase,
        measured_phase=theirs.phase,
        in_short=tuple(p for p in phases if p in predicted.abridged | measured.abridged),
        num_events=sum(
            1
            for phase, _, _ in predicted.events()
            if phase not in predicted.abridged | measured.abridged
        ),
        parting=parting(predicted, batch, measured, measured_batch, smallest_bytes),
    )


def parting(
    predicted: Timeline,
    batch: int,
    measured: Timeline,
    measured_batch: int = 1,
    smallest_bytes: int = SCALAR_BYTES,
) -> Parting | None:
    """Return the first event above `smallest_bytes` that differs in sign or size, None if none.

    Phases that either side tells in short are left out, and so is the order of frees among
    themselves.
    """
    ours = _steps(predicted, batch, smallest_bytes)
    theirs = _steps(measured, measured_batch, smallest_bytes)
    for stretch in dict.fromkeys((*ours, *theirs)):
        phase = stretch[0]
        if phase in predicted.abridged | measured.abridged:
            continue
        pairs = zip_longest(ours.get(stretch, []), theirs.get(stretch, []))
        for index, (one, other) in enumerate(pairs):
            if one is None or other is None or one.bytes != other.bytes:
                return Parting(phase, index, one, other)
    return None


def _steps(timeline: Timeline, batch: int, smallest_bytes: int) -> dict[Stretch, list[Step]]:
    found: dict[Stretch, list[Step]] = {}
    for stretch, (sign, buffer) in _events(timeline):
        size = timeline.bytes_of(buffer, batch)
        if size > smallest_bytes and buffer.category != "workspace":
            found.setdefault(stretch, []).append(Step(sign * size, buffer.name))
    return {stretch: _frees_sorted(steps) for stretch, steps in found.items()}


def _frees_sorted(steps: list[Step]) -> list[Step]:
    """Between two allocations the order of the frees changes no peak: the largest goes first."""
    ordered: list[Step] = []
    for frees, run in groupby(steps, lambda step: step.bytes < 0):
        steps_of_run = list(run)
        ordered += sorted(steps_of_run, key=lambda step: step.bytes) if frees else steps_of_run
    return ordered


def _terms(
    predicted: Timeline,
    batch: int,
    ours: Alive,
    measured: Timeline,
    measured_batch: int,
    theirs: Alive,
) -> tuple[Term, ...]:
    """Sums by name. A measured tensor has the name of the predicted one made in its place."""
    names = _names(predicted, batch, measured, measured_batch)
    one: dict[str, int] = {}
    other: dict[str, int] = {}
    made_in: dict[str, str] = {}
    for buffer, count in ours.buffers.items():
        one[buffer.name] = one.get(buffer.name, 0) + count * predicted.bytes_of(buffer, batch)
    for buffer, count in theirs.buffers.items():
        name = names.get(buffer, buffer.name)
        size = count * measured.bytes_of(buffer, measured_batch)
        other[name] = other.get(name, 0) + size
        if buffer.name != name:
            made_in.setdefault(name, buffer.name)
    found = [
        Term(name, Pair(one.get(name, 0), other.get(name, 0)), made_in.get(name, ""))
        for name in dict.fromkeys((*one, *other))
    ]
    return tuple(sorted(found, key=lambda term: -max(term.bytes.predicted, term.bytes.measured)))


def _names(
    predicted: Timeline, batch: int, measured: Timeline, measured_batch: int
) -> dict[Buffer, str]:
    """The predicted name of each measured tensor, in each stretch as far as the sizes agree."""
    known = {b.name for b in predicted.resident} | {e.buffer.name for _, _, e in predicted.events()}
    ours, theirs = _allocated(predicted, batch), _allocated(measured, measured_batch)
    names: dict[Buffer, str] = {}
    for stretch, made in theirs.items():
        for (size, buffer), (told_size, told) in zip(made, ours.get(stretch, []), strict=False):
            if size != told_size:
                break
            if buffer.name not in known:
                names[buffer] = told.name
    return names


def _allocated(timeline: Timeline, batch: int) -> dict[Stretch, list[tuple[int, Buffer]]]:
    """The allocations of each stretch in order, scratch and a few numbers left out."""
    found: dict[Stretch, list[tuple[int, Buffer]]] = {}
    for stretch, (sign, buffer) in _events(timeline):
        size = timeline.bytes_of(buffer, batch)
        if sign > 0 and size > SCALAR_BYTES and buffer.category != "workspace":
            tensor = timeline.aliases.get(buffer, buffer)
            found.setdefault(stretch, []).append((size, tensor))
    return found


def _events(timeline: Timeline) -> Iterator[tuple[Stretch, Event]]:
    """Every event with its phase and how often that phase began before: micro-steps repeat it."""
    begun: dict[Phase, int] = {}
    last: Phase | None = None
    for phase, _, event in timeline.events():
        if phase != last:
            begun[phase] = begun.get(phase, -1) + 1
            last = phase
        yield (phase, begun[phase]), event


def _by_category(timeline: Timeline, batch: int, alive: Alive) -> dict[Category, int]:
    sizes: dict[Category, int] = {}
    for buffer, count in alive.buffers.items():
        size = count * timeline.bytes_of(buffer, batch)
        sizes[buffer.category] = sizes.get(buffer.category, 0) + size
    return sizes

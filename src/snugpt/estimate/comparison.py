"""Two timelines of one step, side by side: phase by phase, kind by kind, and where they part.

Predicted stands beside traced or recorded. They are made from different things, the operations in
`stacks/` and the code that runs, so that where they agree neither is likely to be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, zip_longest

from snugpt.estimate.timeline import Alive, Timeline
from snugpt.spec.memory import Category, Phase


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
class Comparison:
    """Peaks of the requested bytes, kernels' own scratch left out."""

    peak: Pair
    phases: dict[Phase, Pair]
    categories: dict[Category, Pair]  # alive at each side's own peak
    predicted_phase: Phase
    measured_phase: Phase
    parting: Parting | None


def compare(
    predicted: Timeline,
    batch: int,
    measured: Timeline,
    measured_batch: int = 1,
    *,
    smallest_bytes: int = 4096,
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
        predicted_phase=ours.phase,
        measured_phase=theirs.phase,
        parting=parting(predicted, batch, measured, measured_batch, smallest_bytes),
    )


def parting(
    predicted: Timeline,
    batch: int,
    measured: Timeline,
    measured_batch: int = 1,
    smallest_bytes: int = 4096,
) -> Parting | None:
    """Return the first event above `smallest_bytes` that differs in sign or size, None if none.

    Phases that either side tells in short are left out, and so is the order of frees among
    themselves.
    """
    ours = _steps(predicted, batch, smallest_bytes)
    theirs = _steps(measured, measured_batch, smallest_bytes)
    for phase in dict.fromkeys((*ours, *theirs)):
        if phase in predicted.abridged | measured.abridged:
            continue
        pairs = zip_longest(ours.get(phase, []), theirs.get(phase, []))
        for index, (one, other) in enumerate(pairs):
            if one is None or other is None or one.bytes != other.bytes:
                return Parting(phase, index, one, other)
    return None


def _steps(timeline: Timeline, batch: int, smallest_bytes: int) -> dict[Phase, list[Step]]:
    found: dict[Phase, list[Step]] = {}
    for phase, _, (sign, buffer) in timeline.events():
        size = timeline.bytes_of(buffer, batch)
        if size > smallest_bytes and buffer.category != "workspace":
            found.setdefault(phase, []).append(Step(sign * size, buffer.name))
    return {phase: _frees_sorted(steps) for phase, steps in found.items()}


def _frees_sorted(steps: list[Step]) -> list[Step]:
    """Between two allocations the order of the frees changes no peak: the largest goes first."""
    ordered: list[Step] = []
    for frees, run in groupby(steps, lambda step: step.bytes < 0):
        steps_of_run = list(run)
        ordered += sorted(steps_of_run, key=lambda step: step.bytes) if frees else steps_of_run
    return ordered


def _by_category(timeline: Timeline, batch: int, alive: Alive) -> dict[Category, int]:
    sizes: dict[Category, int] = {}
    for buffer, count in alive.buffers.items():
        size = count * timeline.bytes_of(buffer, batch)
        sizes[buffer.category] = sizes.get(buffer.category, 0) + size
    return sizes

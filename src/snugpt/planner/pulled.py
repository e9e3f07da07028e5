"""Each lever pulled by itself: what it takes off the peak of a recipe and what it adds to a step.

The page on memory, the advice of a run that is out of memory and the benches ask this one list, so
that a lever that the trainer learns appears in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, NamedTuple

import msgspec

from snugpt.errors import BadQuestionError
from snugpt.estimate.levers import why_not
from snugpt.estimate.memory import batch_of, runtime_of, timeline_of
from snugpt.estimate.speed import step_time_s, training_rate
from snugpt.estimate.stacks.catalogue import SNUGPT
from snugpt.planner.levers import is_exact
from snugpt.spec.gpu import Gpu
from snugpt.spec.memory import Phase
from snugpt.spec.recipe import SELECTIVE_STEPS, TrainingRecipe
from snugpt.spec.shape import ModelShape

# Levers that leave the question as it is: another optimizer or another number of cards does not.
PULLED = ("loss", "checkpoint", "compile", "offload", "state_dtype", "weight_dtype", "fp8")
Changes = Mapping[str, Any]  # fields of a recipe


class Pulled(NamedTuple):
    """A recipe with one lever pulled, beside the one without.

    `bytes_saved` is of the allocated peak, or of the phase that was asked for; `time_factor` is
    estimated step time over step time.
    """

    changes: Changes
    recipe: TrainingRecipe
    exact: bool
    bytes_saved: int
    time_factor: float


def values(levers: Mapping[str, tuple[str, ...]] = SNUGPT.levers) -> Iterator[Changes]:
    """Yield every value of every lever in `PULLED`, `selective` with every set of its steps."""
    for lever in PULLED:
        for value in levers.get(lever, ()):
            if value == "selective":
                for number in range(1, len(SELECTIVE_STEPS) + 1):
                    for steps in combinations(SELECTIVE_STEPS, number):
                        yield {"checkpoint": "selective", "selective_steps": steps}
            elif lever == "checkpoint":
                yield {"checkpoint": value, "selective_steps": ()}
            else:
                yield {lever: value}


def pulled(
    shape: ModelShape,
    recipe: TrainingRecipe,
    gpu: Gpu,
    *,
    num_threads: int = 1,
    phase: Phase | None = None,
) -> list[Pulled]:
    """Return what can be changed about one lever of a recipe, in the order of `PULLED`."""
    rate = training_rate(gpu, recipe).flops_per_s.expected
    step_s = step_time_s(shape, recipe, gpu, rate)
    before = _peak_bytes(shape, recipe, gpu, num_threads, phase)
    found = []
    for changes in values():
        changed = _changed(shape, recipe, gpu, num_threads, changes)
        if changed is not None:
            saved = before - _peak_bytes(shape, changed, gpu, num_threads, phase)
            factor = step_time_s(shape, changed, gpu, rate) / step_s
            found.append(Pulled(changes, changed, is_exact(changed), saved, factor))
    return found


def words(changes: Changes) -> str:
    """The changes as they are written on a command line."""
    named = dict(changes)
    steps = named.pop("selective_steps", ())
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in named.items()]
    if "fp8" in named:
        flags = ["--fp8" if flag.startswith("--fp8") else flag for flag in flags]
    return " ".join([*flags, *(["--selective-steps " + ",".join(steps)] if steps else [])])


def _changed(
    shape: ModelShape, recipe: TrainingRecipe, gpu: Gpu, num_threads: int, changes: Changes
) -> TrainingRecipe | None:
    """The recipe with the changes; None where it has them already or can't have them."""
    try:
        changed = msgspec.structs.replace(recipe, **changes)
    except BadQuestionError:
        return None
    runtime = runtime_of(shape, changed, gpu, num_threads)
    if changed == recipe or why_not(shape, changed, runtime) is not None:
        return None
    return changed


def _peak_bytes(
    shape: ModelShape, recipe: TrainingRecipe, gpu: Gpu, num_threads: int, phase: Phase | None
) -> int:
    runtime = runtime_of(shape, recipe, gpu, num_threads)
    timeline = timeline_of(shape, recipe, runtime)
    if phase is None:
        return timeline.peak_bytes(batch_of(recipe))
    return timeline.read(batch_of(recipe))[1].get(phase, 0)

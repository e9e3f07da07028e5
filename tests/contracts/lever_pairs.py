"""Sets of levers in which every pair of values occurs that can be pulled together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from msgspec.structs import replace
from recorder import SCHEDULE

from snugpt.estimate.levers import why_not
from snugpt.estimate.stacks.catalogue import SNUGPT
from snugpt.planner.levers import ways_to_checkpoint
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

Choice = dict[str, Any]  # fields of a recipe
Axes = dict[str, tuple[Choice, ...]]
Pair = tuple[tuple[str, int], tuple[str, int]]  # (axis, which of its choices), twice
LEVERS = ("loss", "optimizer", "state_dtype", "weight_dtype", "fp8", "offload")
BATCH, SEQ_LEN = 2, 160


def axes_of(shape: ModelShape) -> Axes:
    """Every value of every lever that one process can be traced with, the default first."""
    axes: Axes = {name: tuple({name: value} for value in SNUGPT.levers[name]) for name in LEVERS}
    axes["checkpoint"] = tuple(ways_to_checkpoint(shape))
    clipped, free = SCHEDULE, replace(SCHEDULE, clip_norm=0.0)
    axes["passes"] = (
        {"grad_accum_steps": 2, "schedule": clipped},
        {"grad_accum_steps": 1, "schedule": clipped},
        {"grad_accum_steps": 1, "schedule": free},  # gradients are handed on in backward
        {"grad_accum_steps": 2, "schedule": free},
    )
    return axes


def recipe_of(axes: Axes, chosen: dict[str, int], compute_dtype: str) -> TrainingRecipe:
    fields: Choice = {}
    for axis, choices in axes.items():
        fields |= choices[chosen.get(axis, 0)]
    tokens = BATCH * SEQ_LEN * fields["grad_accum_steps"]
    return TrainingRecipe(
        seq_len=SEQ_LEN, device_batch_size=BATCH, total_batch_tokens=tokens,
        total_tokens=10 * tokens, compute_dtype=compute_dtype, loss_chunk_tokens=64, **fields,
    )  # fmt: skip


def covering(
    shape: ModelShape, runtime: Runtime, compute_dtype: str
) -> Iterator[tuple[TrainingRecipe, set[Pair]]]:
    """Yield recipes, each with the pairs that it is the first to have."""
    axes = axes_of(shape)

    def can(chosen: dict[str, int]) -> bool:
        return why_not(shape, recipe_of(axes, chosen, compute_dtype), runtime) is None

    left = {pair for pair in pairs_of(axes) if can(dict(pair))}
    while left:
        chosen = _widened(dict(min(left)), axes, left, can)
        new = left & _pairs_in(chosen)
        left -= new
        yield recipe_of(axes, chosen, compute_dtype), new


def pairs_of(axes: Axes) -> set[Pair]:
    """Every pair of choices of two axes, the axes in the order of their names."""
    return {
        ((a, i), (b, j))
        for a, b in combinations(sorted(axes), 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }


def _widened(
    chosen: dict[str, int], axes: Axes, left: set[Pair], can: Callable[[dict[str, int]], bool]
) -> dict[str, int]:
    """The other axes set so that as many pairs as possible are new."""
    for axis, choices in axes.items():
        if axis not in chosen:
            options = [chosen | {axis: i} for i in range(len(choices))]
            chosen = max(
                (option for option in options if can(option)),
                key=lambda option: len(left & _pairs_in(option)),
            )
    return chosen


def _pairs_in(chosen: dict[str, int]) -> set[Pair]:
    return set(combinations(sorted(chosen.items()), 2))  # type: ignore[arg-type]

"""Sets of levers in which every pair of values occurs that can be pulled together.

The style of the model is an axis like the levers: every lever is pulled with every style.
"""

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
from snugpt.spec.shape import STYLES, ModelShape, shape_for

Choice = dict[str, Any]  # fields of a recipe
Axes = dict[str, tuple[Choice, ...]]
Step = tuple[ModelShape, TrainingRecipe]
Pair = tuple[tuple[str, int], tuple[str, int]]  # (axis, which of its choices), twice
LEVERS = ("loss", "optimizer", "state_dtype", "weight_dtype", "fp8", "offload")
BATCH, SEQ_LEN = 2, 160


def axes() -> Axes:
    """Every value of every lever that one process can be traced with, and every style; the default
    first."""
    found: Axes = {name: tuple({name: value} for value in SNUGPT.levers[name]) for name in LEVERS}
    found["style"] = tuple({"style": style} for style in STYLES)
    ways = [way for style in STYLES for way in ways_to_checkpoint(small(style))]
    found["checkpoint"] = tuple(way for i, way in enumerate(ways) if way not in ways[:i])
    clipped, free = SCHEDULE, replace(SCHEDULE, clip_norm=0.0)
    found["passes"] = (
        {"grad_accum_steps": 2, "schedule": clipped},
        {"grad_accum_steps": 1, "schedule": clipped},
        {"grad_accum_steps": 1, "schedule": free},  # gradients are handed on in backward
        {"grad_accum_steps": 2, "schedule": free},
    )
    return found


def small(style: str) -> ModelShape:
    """A model of two layers, large enough for every lever."""
    return shape_for(style, 2, context_len=SEQ_LEN, width=64, heads=4, kv_heads=2, vocab_size=704)


def step_of(found: Axes, chosen: dict[str, int], compute_dtype: str) -> Step:
    """The model and the recipe of some choices; the other axes are at their default."""
    fields: Choice = {}
    for axis, choices in found.items():
        fields |= choices[chosen.get(axis, 0)]
    tokens = BATCH * SEQ_LEN * fields["grad_accum_steps"]
    return small(fields.pop("style")), TrainingRecipe(
        seq_len=SEQ_LEN, device_batch_size=BATCH, total_batch_tokens=tokens,
        total_tokens=10 * tokens, compute_dtype=compute_dtype, loss_chunk_tokens=64, **fields,
    )  # fmt: skip


def covering(runtime: Runtime, compute_dtype: str) -> Iterator[tuple[Step, set[Pair]]]:
    """Yield models with recipes, each with the pairs that it is the first to have."""
    found = axes()

    def can(chosen: dict[str, int]) -> bool:
        shape, recipe = step_of(found, chosen, compute_dtype)
        return why_not(shape, recipe, runtime) is None

    left = {pair for pair in pairs_of(found) if can(dict(pair))}
    while left:
        chosen = _widened(dict(min(left)), found, left, can)
        new = left & _pairs_in(chosen)
        left -= new
        yield step_of(found, chosen, compute_dtype), new


def pairs_of(found: Axes) -> set[Pair]:
    """Every pair of choices of two axes, the axes in the order of their names."""
    return {
        ((a, i), (b, j))
        for a, b in combinations(sorted(found), 2)
        for i in range(len(found[a]))
        for j in range(len(found[b]))
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

"""Recipes of the nanochat stacks for tests, and its printed parameter counts."""

from __future__ import annotations

from typing import Any

from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.estimate.stacks.nanochat.parameters import shape_of
from snugpt.estimate.timeline import Timeline
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

OCTOBER, FEBRUARY, MARCH, JULY = (
    f"nanochat@{month}" for month in ("2025-10", "2026-02", "2026-03", "2026-07")
)
NAMES = (OCTOBER, FEBRUARY, MARCH, JULY)
HOPPER = Runtime(device="cuda", attention="flash", capability=(9, 0))


def shape_at(name: str, depth: int, **fields: Any) -> ModelShape:
    version = find_stack(name).version
    assert version is not None
    return shape_of(version, depth, **fields)


def recipe_for(
    name: str,
    *,
    batch: int = 1,
    seq_len: int = 2048,
    accumulation: int = 1,
    world_size: int = 1,
    launcher: str | None = None,
    fp8: bool = False,
) -> TrainingRecipe:
    tokens = batch * seq_len * accumulation * world_size
    return TrainingRecipe(
        seq_len=seq_len, device_batch_size=batch, grad_accum_steps=accumulation,
        world_size=world_size, total_batch_tokens=tokens, total_tokens=tokens,
        compute_dtype="bf16", loss="plain", loss_chunk_tokens=seq_len, checkpoint="none",
        optimizer="muon", fp8="on" if fp8 else "off", compile="on",
        sharding="optimizer" if world_size > 1 else "none", stack=name,
        launcher=launcher or ("torchrun" if world_size > 1 else "python"), schedule=None,
    )  # fmt: skip


def timeline_for(shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime = HOPPER) -> Timeline:
    return find_stack(recipe.stack).timeline(shape, recipe, runtime)

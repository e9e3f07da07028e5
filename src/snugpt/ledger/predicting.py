"""From a published row to what we would have said of it, or to the reason why we say nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from snugpt.errors import BadQuestionError
from snugpt.estimate.memory import memory_estimate, timeline_of
from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.estimate.stacks.nanochat.parameters import shape_of
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.gpu import Gpu
from snugpt.spec.published import PublishedRow, PublishedRun
from snugpt.spec.recipe import Launcher, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

Evidence = Literal["launcher stated", "launcher inferred", "launcher unknown"]


NO_RUN = "no run is given for it"


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What a stack says of a row; None where the row leaves two answers, or the card is unknown."""

    stack: str
    evidence: Evidence
    allocated_bytes: int | None
    process_high_bytes: int | None = None
    capacity_bytes: int | None = None
    fits: bool | None = None


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why a row is not predicted, in one phrase."""

    reason: str


def prediction_of(row: PublishedRow, run: PublishedRun | None) -> Prediction | Refusal:
    """Predict a row by the stack of its run; every recipe that the row allows is asked.

    Where those disagree, the figure is None, not a choice.
    """
    refused = _refusal(row, run)
    if refused is not None or run is None or run.stack is None:
        return Refusal(reason=refused or NO_RUN)
    try:
        shape, recipes = _shape(row, run.stack), tuple(_recipes(row, run, run.stack))
    except BadQuestionError as error:
        return Refusal(reason=f"the stack has no such model: {error.message}")
    card = _card(row)
    allocated = {_allocated_bytes(shape, recipe, card, run) for recipe in recipes}
    found = Prediction(
        stack=run.stack,
        evidence=_evidence(run),
        allocated_bytes=allocated.pop() if len(allocated) == 1 else None,
    )
    if card is None:
        return found
    estimates = [memory_estimate(shape, recipe, card) for recipe in recipes]
    highs = [estimate.process_bytes.high for estimate in estimates]
    verdicts = {estimate.fits for estimate in estimates}
    return msgspec.structs.replace(
        found,
        process_high_bytes=max(highs),
        capacity_bytes=estimates[0].capacity_bytes,
        fits=verdicts.pop() if len(verdicts) == 1 else None,
    )


def _refusal(row: PublishedRow, run: PublishedRun | None) -> str | None:
    """The first reason that holds."""
    measured = row.measured
    if row.kind == "activation_formula":
        return "a formula, not a measurement"
    if measured.outcome is None and measured.allocated_mib is measured.reserved_mib is None:
        return "not a memory row"
    if row.program_name != "nanochat":
        return f"program not modelled: {row.program_name}"
    if _modified(row):
        return "model modified"
    if None in (row.seq_len, row.device_batch_size, row.num_gpus, row.model.layers):
        return "shape not stated"
    if run is None:
        return NO_RUN
    if run.stack is None:
        return "version not modelled: " + row.program.partition("@")[2]
    return None


def _modified(row: PublishedRow) -> bool:
    said = f"{row.program} {row.model.style} {row.notes}"
    return any(word in said for word in ("modified", "fork change", "fork attention"))


def _evidence(run: PublishedRun) -> Evidence:
    by_launcher: dict[str, Evidence] = {
        "stated": "launcher stated",
        "inferred": "launcher inferred",
        "unknown": "launcher unknown",
    }
    return by_launcher[run.launcher_is]


def _shape(row: PublishedRow, stack: str) -> ModelShape:
    """The dial's shape with the row's own heads, which move only the attention's statistics."""
    version = find_stack(stack).version
    assert version is not None
    assert row.model.layers is not None
    assert row.seq_len is not None
    shape = shape_of(version, row.model.layers, seq_len=row.seq_len, vocab_size=row.model.vocab)
    heads, width = row.model.heads or shape.num_heads, row.model.dim or shape.model_dim
    if width != shape.model_dim:
        raise BadQuestionError(f"width {width} is not that of depth {row.model.layers}")
    return msgspec.structs.replace(
        shape, num_heads=heads, num_kv_heads=row.model.kv_heads or heads, head_dim=width // heads
    )


def _recipes(row: PublishedRow, run: PublishedRun, stack: str) -> Iterator[TrainingRecipe]:
    """Every recipe the row allows: both launchers, with and without accumulation."""
    launchers: tuple[Launcher, ...] = (
        ("python", "torchrun") if run.launcher is None else (run.launcher,)
    )
    accumulations = (1, 2) if row.grad_accum is None else (row.grad_accum,)
    for launcher in launchers:
        for accumulation in accumulations:
            assert row.seq_len is not None
            assert row.device_batch_size is not None
            assert row.num_gpus is not None
            yield nanochat_recipe(
                stack,
                seq_len=row.seq_len,
                device_batch_size=row.device_batch_size,
                grad_accum_steps=accumulation,
                world_size=row.num_gpus,
                launcher=launcher,
                fp8="fp8" in (row.compute_dtype or ""),
            )


def nanochat_recipe(
    stack: str,
    *,
    seq_len: int,
    device_batch_size: int,
    grad_accum_steps: int,
    world_size: int = 1,
    launcher: Launcher = "python",
    fp8: bool = False,
) -> TrainingRecipe:
    """Return what nanochat's base_train does at these sizes: one step, everything else its own."""
    tokens = device_batch_size * seq_len * grad_accum_steps * world_size
    return TrainingRecipe(
        seq_len=seq_len,
        device_batch_size=device_batch_size,
        grad_accum_steps=grad_accum_steps,
        world_size=world_size,
        total_batch_tokens=tokens,
        total_tokens=tokens,
        compute_dtype="bf16",
        loss="plain",
        loss_chunk_tokens=seq_len,
        checkpoint="none",
        optimizer="muon",
        fp8="on" if fp8 else "off",
        compile="on",
        sharding="optimizer" if world_size > 1 else "none",
        stack=stack,
        launcher=launcher,
        schedule=None,
    )


def _card(row: PublishedRow) -> Gpu | None:
    try:
        return find_gpu(row.gpu or "")
    except BadQuestionError:
        return None


def _allocated_bytes(
    shape: ModelShape, recipe: TrainingRecipe, card: Gpu | None, run: PublishedRun
) -> int:
    if card is not None:
        return memory_estimate(shape, recipe, card).allocated_bytes
    runtime = Runtime(device="cuda", attention="flash", capability=run.capability)
    alive, _ = timeline_of(shape, recipe, runtime).read(recipe.device_batch_size)
    return alive.bytes

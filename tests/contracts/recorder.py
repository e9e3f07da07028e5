"""One real training step on the CPU, weighed by torch's own allocator."""

from __future__ import annotations

import torch
from msgspec.structs import replace

from snugpt.model.build import build_for_training
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import Batch, evaluate_batch, step
from snugpt.run.cpu_allocations import CpuAllocations
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

SCHEDULE = Schedule(
    learning_rate=1e-3,
    matrix_learning_rate=0.02,
    weight_decay=0.0,
    warmup_fraction=0.0,
    cooldown_fraction=0.5,
    final_fraction=0.0,
    clip_norm=1.0,
    seed=0,
    eval_every_steps=10,
    eval_tokens=1000,
    save_every_steps=10,
)


def recipe_for(
    shape: ModelShape,
    *,
    batch: int,
    seq_len: int | None = None,
    accumulation: int = 1,
    optimizer: str = "muon",
    checkpoint: str = "none",
    steps: tuple[str, ...] = (),
    loss: str = "chunked",
    chunk: int = 64,
    dtype: str = "fp32",
    clip_norm: float = 1.0,
    **levers: str,
) -> TrainingRecipe:
    T = shape.context_len if seq_len is None else seq_len
    return TrainingRecipe(
        seq_len=T,
        device_batch_size=batch,
        grad_accum_steps=accumulation,
        total_batch_tokens=batch * T * accumulation,
        total_tokens=batch * T * accumulation * 10,
        compute_dtype=dtype,
        loss=loss,
        loss_chunk_tokens=chunk,
        checkpoint=checkpoint,
        selective_steps=steps,
        optimizer=optimizer,
        schedule=replace(SCHEDULE, clip_norm=clip_norm),
        **levers,
    )


def cpu_runtime(shape: ModelShape) -> Runtime:
    attention = "math" if shape.dropout else "cpu"
    return Runtime(device="cpu", attention=attention, num_threads=torch.get_num_threads())


def measured_phases(shape: ModelShape, recipe: TrainingRecipe) -> dict[str, int]:
    """The most bytes alive in each phase of the second step and of an evaluation batch after it."""

    def batch_of(_: int) -> Batch:
        size = recipe.device_batch_size, recipe.seq_len
        tokens, targets = (torch.empty(size, dtype=torch.int64) for _ in range(2))
        return tokens.random_(0, shape.vocab_size), targets.random_(0, shape.vocab_size)

    with CpuAllocations(keep_events=False) as allocations:
        model = build_for_training(shape, recipe, cpu_runtime(shape), seed=0)
        optimizers = optimizers_for(model, recipe)
        step(model, optimizers, recipe, batch_of)
        allocations.mark("forward")
        step(model, optimizers, recipe, batch_of, allocations.mark)
        allocations.mark("evaluate")
        evaluate_batch(model.eval(), recipe, batch_of(0))
    assert not allocations.interrupted
    return allocations.phases

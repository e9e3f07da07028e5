"""Half the memory of nanochat's step, by trace: d24, 16 rows of 2048 tokens, one GPU, exact levers.

    python bench/half_memory.py --output bench/results/half_memory.txt

Each rung of the exact ladder is predicted (the walk) and traced (the real step on the meta device);
both must say the same. nanochat's own peak is that of its stack in this house, compiled, held to
its published peaks elsewhere (tests/estimate/test_nanochat_published.py). All are requested bytes:
live tensors, each rounded up to 512, without the library's workspaces and the allocator's slack.

We keep every weight, gradient and moment in fp32. nanochat keeps those of its embeddings in bf16;
what its formats would take off ours is said, and not counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from estimate_speed import SCHEDULE
from snugpt.estimate.flops import (
    multiplied_again,
    recomputed_flops_per_token,
    training_flops_per_token,
)
from snugpt.estimate.levers import why_not
from snugpt.estimate.making_again import selective_sets
from snugpt.estimate.memory import timeline_of
from snugpt.estimate.parameters import parameter_groups
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime, runtime_for
from snugpt.spec.shape import ModelShape, shape_for
from snugpt.tracing.steps import trace
from snugpt.units import GIB

DEPTH, BATCH, SEQ_LEN, ACCUMULATION = 24, 16, 2048, 2
CHUNK_TOKENS = 1024  # the planner's own for this vocabulary: 128 MiB of fp32 logits
NANOCHAT = "nanochat@2026-07"
TARGET = 0.5
# Weight, gradient and two moments: four fp32 numbers here, four bf16 numbers there.
SAVED_BY_NANOCHATS_FORMATS = 4 * (4 - 2)


class Rung(NamedTuple):
    """One way to checkpoint: bytes by both sources, and what it computes again."""

    name: str
    predicted_bytes: int
    traced_bytes: int
    phase: str
    extra_of_products: float
    extra_of_step: float


def ours(checkpoint: str, steps: tuple[str, ...] = ()) -> TrainingRecipe:
    tokens = BATCH * SEQ_LEN * ACCUMULATION
    return TrainingRecipe(
        seq_len=SEQ_LEN, device_batch_size=BATCH, grad_accum_steps=ACCUMULATION,
        total_batch_tokens=tokens, total_tokens=tokens, compute_dtype="bf16", loss="chunked",
        loss_chunk_tokens=CHUNK_TOKENS, checkpoint=checkpoint, selective_steps=steps,
        optimizer="muon", schedule=SCHEDULE,
    )  # fmt: skip


def theirs() -> TrainingRecipe:
    tokens = BATCH * SEQ_LEN * ACCUMULATION
    return TrainingRecipe(
        seq_len=SEQ_LEN, device_batch_size=BATCH, grad_accum_steps=ACCUMULATION,
        total_batch_tokens=tokens, total_tokens=tokens, compute_dtype="bf16", loss="plain",
        loss_chunk_tokens=SEQ_LEN, checkpoint="none", optimizer="muon", compile="on",
        stack=NANOCHAT, schedule=None,
    )  # fmt: skip


def rung(shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime) -> Rung:
    assert why_not(shape, recipe, runtime) is None
    predicted, _ = timeline_of(shape, recipe, runtime).read(BATCH, workspace=False)
    traced, _ = trace(shape, recipe, runtime).read(BATCH, workspace=False)
    extra = recomputed_flops_per_token(shape, recipe)
    products = 3 * 2 * parameter_groups(shape)["matrices"]
    again = 2 * multiplied_again(shape, recipe.selective_steps)
    if recipe.checkpoint == "blocks":
        again = products // 3
    return Rung(
        " ".join((recipe.checkpoint, ",".join(recipe.selective_steps))).strip(),
        predicted.bytes,
        traced.bytes,
        traced.phase,
        again / products,
        extra / training_flops_per_token(shape, SEQ_LEN),
    )


def report(gpu: str) -> str:
    shape = shape_for("nanochat", DEPTH, context_len=SEQ_LEN)
    runtime = runtime_for(find_gpu(gpu), "bf16")
    whole, _ = timeline_of(shape, theirs(), runtime).read(BATCH, workspace=False)
    recipes = [
        ours("none"), *(ours("selective", steps) for steps in selective_sets(shape)),
        ours("blocks"),
    ]  # fmt: skip
    rungs = [rung(shape, recipe, runtime) for recipe in recipes]
    lines = [
        f"d{DEPTH}, B {BATCH}, T {SEQ_LEN}, accumulation above 1, {gpu}, exact levers, eager;"
        " requested GiB at the peak; no GPU was used",
        f"{NANOCHAT}, compiled, as its stack predicts it: {whole.bytes / GIB:.1f} in {whole.phase}",
        "",
        f"{'checkpoint':<20}{'predicted':>10}{'traced':>8}{'ratio':>7}  {'peak in':<9}"
        f"{'again: % of the matrices':>25}{'% of the step':>15}",
    ]
    lines += [
        f"{each.name:<20}{each.predicted_bytes / GIB:>10.2f}{each.traced_bytes / GIB:>8.2f}"
        f"{each.traced_bytes / whole.bytes:>7.3f}  {each.phase:<9}"
        f"{100 * each.extra_of_products:>24.1f}%{100 * each.extra_of_step:>14.1f}%"
        for each in rungs
    ]
    groups = parameter_groups(shape)
    embeddings = groups["embedding"] + groups["value_embedding"]
    off = SAVED_BY_NANOCHATS_FORMATS * embeddings
    cheapest = next((each for each in rungs if each.traced_bytes <= TARGET * whole.bytes), None)
    lines += [
        "",
        f"embeddings in bf16, as nanochat keeps them, would take off {off / GIB:.1f}"
        f" ({embeddings / 1e6:.0f} M parameters, weight, gradient and two moments); not counted",
        f"at most {TARGET} x: {'not reached' if cheapest is None else cheapest.name}",
    ]
    assert all(each.predicted_bytes == each.traced_bytes for each in rungs), rungs
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", default="h100-80gb")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    text = report(arguments.gpu)
    print(text, end="")
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

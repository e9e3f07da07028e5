"""How long one estimate takes: cold (a shape and levers not seen before) and warm (another batch).

    python bench/estimate_speed.py

Held to: 5 ms cold, 20 microseconds warm. Cold is the walk and its envelope; what only a printed
plan needs (terms, the allocator's simulation) is timed on its own lines.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

from snugpt.estimate import memory
from snugpt.estimate.simulation import simulate
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.runtime import runtime_for
from snugpt.spec.shape import STYLES, ModelShape, shape_for

SCHEDULE = Schedule(
    learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.0, warmup_fraction=0.0,
    cooldown_fraction=0.5, final_fraction=0.0, clip_norm=1.0, seed=0, eval_every_steps=100,
    eval_tokens=2048, save_every_steps=100,
)  # fmt: skip


def recipe_for(shape: ModelShape, batch: int, checkpoint: str) -> TrainingRecipe:
    """A recipe of four micro-steps in bf16."""
    tokens = batch * shape.context_len * 4
    return TrainingRecipe(
        seq_len=shape.context_len, device_batch_size=batch, grad_accum_steps=4,
        total_batch_tokens=tokens, total_tokens=tokens, compute_dtype="bf16", loss="chunked",
        loss_chunk_tokens=1024, checkpoint=checkpoint, optimizer="muon", schedule=SCHEDULE,
    )  # fmt: skip


def median_s(work: Callable[[], object], before: Callable[[], object], rounds: int) -> float:
    """The median seconds of `work`, with `before` run untimed each time."""
    times = []
    for _ in range(rounds):
        before()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    gpu = find_gpu("h100")
    runtime = runtime_for(gpu, "bf16")
    gc.collect()
    print("style     depth checkpoint   cold ms  warm us  terms ms  simulation ms")
    for style in STYLES:
        for depth, checkpoint in ((12, "none"), (24, "none"), (24, "blocks"), (32, "blocks")):
            shape = shape_for(style, depth)
            recipe = recipe_for(shape, 8, checkpoint)
            cold = median_s(
                lambda s=shape, r=recipe: memory.peak_bytes(s, r, runtime),
                memory._timelines.clear,
                15,
            )
            other = recipe_for(shape, 16, checkpoint)
            warm = median_s(
                lambda s=shape, r=other: memory.peak_bytes(s, r, runtime), lambda: None, 200
            )
            timeline = memory.timeline_of(shape, recipe, runtime)
            terms = median_s(lambda t=timeline: t.read(8), lambda: None, 7)
            played = median_s(lambda t=timeline: simulate(t, 8), lambda: None, 5)
            print(
                f"{style:9} {depth:5} {checkpoint:10} {cold * 1e3:9.2f} {warm * 1e6:8.1f}"
                f" {terms * 1e3:9.2f} {played * 1e3:14.1f}"
            )


if __name__ == "__main__":
    main()

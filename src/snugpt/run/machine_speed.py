"""How fast this machine trains: a few seconds of real steps, kept for every later plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from snugpt.data.durable_file import write_durably
from snugpt.estimate.flops import executed_flops_per_token
from snugpt.model.build import build
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import step
from snugpt.spec.measurement import utc_now
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import shape_for

WARM_UP_STEPS = 2
MACHINE_FILE = "machine.json"


def measure_cpu_rate(seconds: float = 10.0, tick: Callable[[float], None] | None = None) -> float:
    """Train a small model on random tokens for about `seconds`; return the FLOP/s it reached.

    The model is that of the demo, 4 layers of 192, 2048 tokens a step. The rate is that of the
    fastest quarter's slowest step: what else runs on the machine only ever makes steps slower.
    """
    shape = shape_for("nanochat", 4, context_len=256, width=192, heads=3, vocab_size=2048)
    recipe = _recipe(shape.context_len)
    runtime = Runtime(device="cpu", attention="cpu", num_threads=torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)  # the caller's random state is not touched
    model = build(shape, runtime, seed=0)
    optimizers = optimizers_for(model, recipe)
    ids = torch.randint(shape.vocab_size, (8, shape.context_len + 1), generator=generator)
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) <= WARM_UP_STEPS or time.perf_counter() - began < seconds:
        step_began = time.perf_counter()
        step(model, optimizers, recipe, lambda micro_step: batch).item()
        times.append(time.perf_counter() - step_began)
        if tick is not None:
            tick(min(1.0, (time.perf_counter() - began) / max(seconds, 1e-9)))
    step_s = sorted(times[WARM_UP_STEPS:])[(len(times) - WARM_UP_STEPS) // 4]
    return executed_flops_per_token(shape, recipe) * recipe.total_batch_tokens / step_s


def keep_cpu_rate(cache_folder: Path, flops_per_s: float) -> Path:
    """Write the rate where plans look for it; return the file.

    Raises:
        FailedError: the disk is full or the folder can't be written.
    """
    record = {
        "cpu": {
            "flops_per_s": flops_per_s,
            "measured": utc_now(),
            "torch": str(torch.__version__),
            "num_threads": torch.get_num_threads(),
        }
    }
    file = cache_folder / MACHINE_FILE
    write_durably(file, msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    return file


def _recipe(seq_len: int) -> TrainingRecipe:
    tokens = 8 * seq_len
    schedule = Schedule(
        learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.0, warmup_fraction=0.0,
        cooldown_fraction=0.0, final_fraction=1.0, clip_norm=1.0, seed=0, eval_every_steps=1,
        eval_tokens=seq_len, save_every_steps=1,
    )  # fmt: skip
    return TrainingRecipe(
        seq_len=seq_len, device_batch_size=8, grad_accum_steps=1, total_batch_tokens=tokens,
        total_tokens=tokens, compute_dtype="fp32", loss="chunked", loss_chunk_tokens=256,
        checkpoint="none", optimizer="muon", schedule=schedule,
    )  # fmt: skip

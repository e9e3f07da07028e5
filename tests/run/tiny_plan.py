"""A plan made by hand, small enough to be trained a hundred times, and the text it reads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from snugpt.estimate.memory import memory_estimate
from snugpt.estimate.parameters import num_parameters
from snugpt.estimate.speed import speed_estimate
from snugpt.run.reports import Report, TrainingResult
from snugpt.run.run_folder import RunFolder
from snugpt.run.train import train
from snugpt.spec.gpu import Gpu
from snugpt.spec.plan import HostEstimate, Parameters, Plan
from snugpt.spec.question import Question
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.shape import Style, shape_for
from snugpt.units import GIB

CPU = Gpu(
    id="cpu", name="cpu", backend="cpu", memory_bytes=8 * GIB, usable_bytes=8 * GIB,
    bandwidth_bytes_per_s=2e10, flops={"fp32": 1e11},
)  # fmt: skip
CONTEXT, BATCH, ACCUMULATION, VOCAB = 32, 2, 2, 300
STEP_TOKENS = CONTEXT * BATCH * ACCUMULATION


def write_text(path: Path, num_words: int = 4000) -> Path:
    """Words of a made-up language: enough for hundreds of rows, the same at every call."""
    chance = random.Random(5)
    words = ["".join(chance.choices("aeioklmnrst", k=chance.randint(1, 7))) for _ in range(200)]
    path.write_text(" ".join(chance.choices(words, k=num_words)) + "\n", encoding="utf-8")
    return path


def tiny_plan(
    text: Path, style: Style = "nanochat", *, steps: int = 6, vocab: int = VOCAB, **schedule: Any
) -> Plan:
    """gpt2 has dropout, so that its weights depend on the random state."""
    shape = shape_for(
        style, 2, width=32, heads=2, context_len=CONTEXT, vocab_size=vocab,
        dropout=0.2 if style == "gpt2" else None,
    )  # fmt: skip
    recipe = TrainingRecipe(
        seq_len=CONTEXT, device_batch_size=BATCH, grad_accum_steps=ACCUMULATION,
        total_batch_tokens=STEP_TOKENS, total_tokens=steps * STEP_TOKENS, compute_dtype="fp32",
        loss="chunked", loss_chunk_tokens=40, checkpoint="none",
        optimizer="adamw" if style == "gpt2" else "muon", schedule=tiny_schedule(**schedule),
    )  # fmt: skip
    return Plan(
        fits=True, question=Question(input=str(text)), stack="snugpt", command="", gpu=CPU,
        shape=shape, parameters=Parameters(total=num_parameters(shape), groups={}), recipe=recipe,
        reasons={}, speed=speed_estimate(shape, recipe, CPU), data=None,
        memory=memory_estimate(shape, recipe, CPU, num_threads=torch.get_num_threads()),
        host=HostEstimate(ram_bytes=0, disk_bytes=0, checkpoint_bytes=0),
    )  # fmt: skip


def tiny_schedule(**pinned: Any) -> Schedule:
    chosen = {
        "learning_rate": 1e-3, "matrix_learning_rate": 0.02, "weight_decay": 0.1,
        "warmup_fraction": 0.2, "cooldown_fraction": 0.5, "final_fraction": 0.0, "clip_norm": 1.0,
        "seed": 1, "eval_every_steps": 3, "eval_tokens": 6 * CONTEXT, "save_every_steps": 2,
    }  # fmt: skip
    return Schedule(**(chosen | pinned))


class Seen(list[Report]):
    """A watcher that keeps what it is told."""

    def __call__(self, report: Report) -> None:
        self.append(report)

    def of(self, kind: type) -> list[Any]:
        return [report for report in self if isinstance(report, kind)]


def run_tiny(
    plan: Plan, path: Path, watcher: Any = None, argv: tuple[str, ...] = ()
) -> TrainingResult:
    """Train beside a cache and a ledger that lie next to the run's folder."""
    return train(
        plan, RunFolder(path), cache_dir=path.parent / "cache", argv=argv,
        ledger_folder=path.parent / "ledger", watcher=watcher if watcher is not None else Seen(),
    )  # fmt: skip

"""Question: what the user wants and has. What is pinned stays; None is for the planner to choose."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from snugpt.errors import bad_value
from snugpt.spec.recipe import Checkpoint, ComputeDtype, Loss, Optimizer
from snugpt.spec.shape import Style

Objective = Literal["speed", "memory"]


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One field per flag of `snugpt plan`; lengths and totals in tokens, `reserve` in bytes."""

    task: Literal["train", "generate"] = "train"
    stack: Literal["snugpt"] = "snugpt"
    gpu: str | None = None  # None: this machine
    style: Style | None = None
    depth: int | None = None
    preset: str | None = None
    model: str | None = None  # a trained run, for `task = generate`
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    mlp: int | None = None
    vocab_size: int | None = None
    tie: bool | None = None
    dropout: float | None = None
    window_pattern: str | None = None
    seq_len: int | None = None
    input: str | None = None
    byte_tokens: bool | None = None  # one token per byte, as the `_char` presets have it
    total_batch_tokens: int | None = None
    total_tokens: int | None = None
    tokens_per_param: float | None = None
    num_iterations: int | None = None
    hours: float | None = None
    device_batch_size: int | None = None
    grad_accum_steps: int | None = None
    compute_dtype: ComputeDtype | None = None
    loss: Loss | None = None
    loss_chunk_tokens: int | None = None
    checkpoint: Checkpoint | None = None
    optimizer: Optimizer | None = None
    objective: Objective = "speed"
    reserve: int = 0
    learning_rate: float | None = None
    matrix_learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_fraction: float | None = None
    cooldown_fraction: float | None = None
    clip_norm: float | None = None
    seed: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    batch: int | None = None
    prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    weight_dtype: ComputeDtype | None = None

    def __post_init__(self) -> None:
        for field, (low, high) in _RANGES.items():
            value = getattr(self, field)
            if value is None:
                continue
            if not math.isfinite(value) or not low <= value <= high:
                shown = f"{low:g} to {high:g}" if high > 1e6 else f"{low} to {high}"
                raise bad_value(field, value, shown, hint="snugpt plan --help")


_RANGES: dict[str, tuple[float, float]] = {
    "depth": (1, 1024),
    "layers": (1, 1024),
    "width": (1, 65536),
    "heads": (1, 1024),
    "kv_heads": (1, 1024),
    "mlp": (1, 1 << 20),
    "vocab_size": (2, 1 << 24),
    "seq_len": (1, 1 << 24),
    "total_batch_tokens": (1, 1 << 40),
    "total_tokens": (1, 1 << 60),
    "tokens_per_param": (1e-6, 1e6),
    "num_iterations": (1, 1 << 40),
    "hours": (1e-6, 1e6),
    "device_batch_size": (1, 1 << 24),
    "grad_accum_steps": (1, 1 << 24),
    "loss_chunk_tokens": (1, 1 << 24),
    "reserve": (0, 1 << 60),
    "dropout": (0.0, 0.99),
    "seed": (0, (1 << 63) - 1),
    "eval_every": (1, 1 << 40),
    "save_every": (1, 1 << 40),
    "batch": (1, 1 << 24),
    "prompt_tokens": (1, 1 << 24),
    "max_new_tokens": (1, 1 << 24),
}

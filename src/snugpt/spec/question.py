"""Question: what the user wants and has. What is pinned stays; None is the planner's to choose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from snugpt.errors import bad_value
from snugpt.spec.recipe import (
    LARGEST_CLIP_NORM,
    Checkpoint,
    Compile,
    ComputeDtype,
    Launcher,
    Loss,
    Offload,
    Optimizer,
    Sharding,
    StateDtype,
)
from snugpt.spec.shape import Style

Objective = Literal["speed", "memory"]
# Of training: master (fp32, and bf16 where it computes) or bf16; of generation: what it computes in
StoredDtype = Literal["master", "fp32", "bf16", "fp16"]


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One field per flag of `snugpt plan`; lengths and totals in tokens, `reserve` in bytes."""

    task: Literal["train", "generate"] = "train"
    stack: str = "snugpt"  # the program that will run it; nanochat is its newest version
    gpu: str | None = None  # None: this machine
    num_gpus: int | None = None
    launcher: Launcher | None = None
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
    batch_size: int | None = None  # sequences of one optimizer step; total = batch_size x seq_len
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
    compile: Compile | None = None
    optimizer: Optimizer | None = None
    selective_steps: str | None = None  # some of pointwise, qkv, up, with commas between them
    state_dtype: StateDtype | None = None
    fp8: bool | None = None
    sharding: Sharding | None = None
    offload: Offload | None = None
    exact: bool | None = None  # only levers that leave the arithmetic as it is
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
    weight_dtype: StoredDtype | None = None

    def __post_init__(self) -> None:
        for field, (low, high) in RANGES.items():
            value = getattr(self, field)
            if value is None:
                continue
            if not math.isfinite(value) or not low <= value <= high:
                raise bad_value(field, value, f"{low:g} to {high:g}", hint="snugpt plan --help")


RANGES: dict[str, tuple[float, float]] = {
    "num_gpus": (1, 8),
    "depth": (1, 1024),
    "layers": (1, 1024),
    "width": (1, 65536),
    "heads": (1, 1024),
    "kv_heads": (1, 1024),
    "mlp": (1, 1 << 20),
    "vocab_size": (2, 1 << 24),
    "seq_len": (1, 1 << 24),
    "batch_size": (1, 1 << 24),
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
    "learning_rate": (1e-9, 1e3),
    "matrix_learning_rate": (1e-9, 1e3),
    "weight_decay": (0.0, 1.0),
    "warmup_fraction": (0.0, 1.0),
    "cooldown_fraction": (0.0, 1.0),
    "clip_norm": (0.0, LARGEST_CLIP_NORM),
    "seed": (0, (1 << 63) - 1),
    "eval_every": (1, 1 << 40),
    "save_every": (1, 1 << 40),
    "batch": (1, 1 << 24),
    "prompt_tokens": (1, 1 << 24),
    "max_new_tokens": (1, 1 << 24),
}

# Other programs' names for our fields, in flags and in config files.
ALIASES: dict[str, str] = {
    "max_seq_len": "seq_len",
    "block_size": "seq_len",
    "total_batch_size": "total_batch_tokens",
    "max_iters": "num_iterations",
    "target_param_data_ratio": "tokens_per_param",
    "input_file": "input",
    "nproc_per_node": "num_gpus",
    "world_size": "num_gpus",
}

TRAINING_ONLY = frozenset(
    (
        *("input", "batch_size", "total_batch_tokens", "total_tokens", "tokens_per_param"),
        *("num_iterations", "hours", "device_batch_size", "grad_accum_steps", "compute_dtype"),
        *("loss", "loss_chunk_tokens", "checkpoint", "compile", "optimizer", "learning_rate"),
        *("matrix_learning_rate", "weight_decay", "warmup_fraction", "cooldown_fraction"),
        *("clip_norm", "seed", "eval_every", "save_every", "num_gpus", "launcher", "fp8"),
        *("selective_steps", "state_dtype", "sharding", "offload", "exact"),
    )
)
GENERATION_ONLY = frozenset({"model", "batch", "prompt_tokens", "max_new_tokens"})

# Of a set only one can be said: each decides what the others would.
RIVALS: tuple[frozenset[str], ...] = (
    frozenset({"batch_size", "total_batch_tokens"}),
    frozenset({"total_tokens", "tokens_per_param", "num_iterations", "hours"}),
    frozenset({"vocab_size", "byte_tokens"}),
)
_DIAL_SETS = frozenset({"layers", "width", "heads", "kv_heads", "mlp"})


def overlay(upper: Mapping[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
    """Lay what was said louder over what was said lower: flags over a file over a preset.

    A field goes where it is said above, and where a rival of it is: `--total-batch-tokens` replaces
    a file's batch_size, `--depth` a preset's layers, width and heads.
    """
    said = {field for field, value in upper.items() if value is not None}
    gone = set(said)
    for rivals in RIVALS:
        if rivals & said:
            gone |= rivals
    if "depth" in said:
        gone |= _DIAL_SETS
    kept = {field: value for field, value in lower.items() if field not in gone}
    return {**kept, **{field: upper[field] for field in upper if field in said}}


def said_fields(question: Question) -> dict[str, Any]:
    """Return the fields that differ from their defaults, in the order of the class."""
    blank = Question()
    fields = {name: getattr(question, name) for name in question.__struct_fields__}
    return {name: value for name, value in fields.items() if value != getattr(blank, name)}

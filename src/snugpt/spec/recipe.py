"""Recipes: how one training step is taken, and how tokens are generated.

Every lever of the product is a field here, under one name from the flag to the plan. A field with
one allowed value states what a run does; it becomes a choice when the trainer can do otherwise.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from snugpt.errors import BadQuestionError, bad_value

ComputeDtype = Literal["fp32", "bf16", "fp16"]
Optimizer = Literal["muon", "adamw"]
Checkpoint = Literal["none", "selective", "blocks"]
SelectiveStep = Literal["pointwise", "qkv", "up"]
Loss = Literal["chunked", "plain"]
StateDtype = Literal["fp32", "bf16", "int8"]
WeightDtype = Literal["master", "bf16"]
Fp8 = Literal["off", "on"]
Sharding = Literal["none", "optimizer", "full"]
Offload = Literal["none", "optimizer", "activations"]
Launcher = Literal["python", "torchrun"]
Compile = Literal["off", "on"]

_COUNTS = (
    "seq_len", "device_batch_size", "grad_accum_steps", "loss_chunk_tokens", "world_size",
)  # fmt: skip
LARGEST_CLIP_NORM = 1e3
SELECTIVE_STEPS: tuple[SelectiveStep, ...] = ("pointwise", "qkv", "up")
# Fields that say how a step is taken, besides its batch and the dtype it computes in.
LEVERS = (
    "checkpoint", "selective_steps", "optimizer", "state_dtype", "weight_dtype", "fp8", "compile",
    "sharding", "offload",
)  # fmt: skip
BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rates, warm-up, decay, clipping, seed, intervals. Of these only whether gradients are clipped
    moves the memory: see `TrainingRecipe.steps_in_backward`."""

    learning_rate: float  # AdamW, for everything Muon does not take
    matrix_learning_rate: float  # Muon
    weight_decay: float
    warmup_fraction: float
    cooldown_fraction: float
    final_fraction: float
    clip_norm: float  # 0: gradients are not clipped
    seed: int
    eval_every_steps: int
    eval_tokens: int
    save_every_steps: int

    def __post_init__(self) -> None:
        for field in ("learning_rate", "matrix_learning_rate"):
            value = getattr(self, field)
            if not 0.0 < value < 1e4:  # also refuses NaN
                raise bad_value(field, value, "above 0, below 10000")
        if not 0.0 <= self.clip_norm <= LARGEST_CLIP_NORM:
            allowed = f"0 to {LARGEST_CLIP_NORM:g}, 0 does not clip"
            raise bad_value("clip_norm", self.clip_norm, allowed)
        for field in ("weight_decay", "warmup_fraction", "cooldown_fraction", "final_fraction"):
            value = getattr(self, field)
            if not 0.0 <= value <= 1.0:
                raise bad_value(field, value, "0 to 1")
        if not 0 <= self.seed < 2**63:
            raise bad_value("seed", self.seed, "0 to 2**63 - 1")
        for field in ("eval_every_steps", "eval_tokens", "save_every_steps"):
            if getattr(self, field) < 1:
                raise bad_value(field, getattr(self, field), "at least 1")


class TrainingRecipe(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="task",
    tag="train",
):
    """How one optimizer step is taken; `"task": "train"` in JSON.

    device_batch_size x seq_len x grad_accum_steps x world_size = total_batch_tokens.
    """

    seq_len: int
    device_batch_size: int
    grad_accum_steps: int
    world_size: int = 1
    total_batch_tokens: int
    total_tokens: int
    compute_dtype: ComputeDtype
    loss: Loss
    loss_chunk_tokens: int
    checkpoint: Checkpoint
    selective_steps: tuple[SelectiveStep, ...] = ()  # what `checkpoint = selective` makes again
    optimizer: Optimizer
    state_dtype: StateDtype = "fp32"
    weight_dtype: WeightDtype = "master"
    fp8: Fp8 = "off"
    compile: Compile = "off"
    sharding: Sharding = "none"
    offload: Offload = "none"
    stack: str = "snugpt"  # the program that takes the step, resolved to its version
    launcher: Launcher = "python"
    schedule: Schedule | None  # None: what the stack's program does by itself

    def __post_init__(self) -> None:
        for field in _COUNTS:
            if not 1 <= getattr(self, field) <= 1 << 40:
                raise bad_value(field, getattr(self, field), "1 to 2**40")
        tokens = self.device_batch_size * self.seq_len * self.grad_accum_steps * self.world_size
        if tokens != self.total_batch_tokens:
            raise BadQuestionError(
                f"total_batch_tokens = {self.total_batch_tokens} is not {self.device_batch_size} x"
                f" {self.seq_len} x {self.grad_accum_steps} x {self.world_size} = {tokens}",
                hint=f"snugpt plan --total-batch-tokens {tokens}",
            )
        if self.launcher == "python" and self.world_size > 1:
            raise bad_value("launcher", self.launcher, "torchrun for several GPUs")
        if self.total_tokens < 1:
            raise bad_value("total_tokens", self.total_tokens, "at least 1")
        if (self.checkpoint == "selective") != bool(self.selective_steps):
            steps = ", ".join(SELECTIVE_STEPS) if self.checkpoint == "selective" else "none"
            raise bad_value("selective_steps", list(self.selective_steps), steps)

    @property
    def steps_in_backward(self) -> bool:
        """Whether each gradient goes to its optimizer as soon as it is complete, and is let go.

        Only where nothing has to see all gradients together: one pass to a step, no clipping, no
        scaled loss, one device.
        """
        alone = self.world_size == 1 and self.grad_accum_steps == 1
        return alone and not self.clips and self.compute_dtype != "fp16"

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped, all together."""
        return self.schedule is None or self.schedule.clip_norm > 0

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one forward and backward pass on one device."""
        return self.device_batch_size * self.seq_len

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens of one chunk of the loss; None where one chunk takes the whole micro-batch."""
        whole = self.loss == "plain" or self.loss_chunk_tokens >= self.micro_batch_tokens
        return None if whole else self.loss_chunk_tokens

    @property
    def num_steps(self) -> int:
        """Optimizer steps until `total_tokens` have been seen."""
        return -(-self.total_tokens // self.total_batch_tokens)


class GenerationRecipe(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="task",
    tag="generate",
):
    """How tokens are generated: `batch` sequences, each a prompt and what follows it."""

    batch: int
    prompt_tokens: int
    max_new_tokens: int
    kv_dtype: ComputeDtype
    weight_dtype: ComputeDtype

    def __post_init__(self) -> None:
        for field in ("batch", "prompt_tokens", "max_new_tokens"):
            if not 1 <= getattr(self, field) <= 1 << 24:
                raise bad_value(field, getattr(self, field), "1 to 2**24")

    @property
    def cache_len(self) -> int:
        """Tokens each sequence can hold: the static cache is this long from the start."""
        return self.prompt_tokens + self.max_new_tokens


Recipe = TrainingRecipe | GenerationRecipe

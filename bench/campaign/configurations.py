"""The configurations of the campaign, the most informative first; nothing here imports torch.

Every third one that is graded is held out, by its position in the list, which was fixed before
anything was measured: it may be compared with a prediction, and never enter a fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from snugpt.errors import BadQuestionError
from snugpt.estimate.compiled import why_not_compiled
from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.estimate.stacks.nanochat.parameters import shape_of as nanochat_shape
from snugpt.ledger.predicting import nanochat_recipe
from snugpt.spec.recipe import LEVERS, GenerationRecipe, Schedule, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape, shape_for
from snugpt.units import GIB

Kind = Literal["training", "generation", "scratch", "boundary", "peer"]
SEQ_LEN = 2048
CHUNK_TOKENS = 1024
STATED = ("checkpoint", "optimizer")  # levers that `training_recipe` has a default of its own for
SCHEDULE = Schedule(
    learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.0, warmup_fraction=0.0,
    cooldown_fraction=0.0, final_fraction=1.0, clip_norm=1.0, seed=0, eval_every_steps=1,
    eval_tokens=1, save_every_steps=1,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One thing to measure; `asked` names what differs from the defaults below."""

    name: str
    kind: Kind
    asked: dict[str, Any] = field(default_factory=dict)
    snapshot: bool = False
    held_out: bool = False

    @property
    def graded(self) -> bool:
        """Whether a prediction of a whole run stands beside it."""
        return self.kind in ("training", "generation", "peer")


def training(name: str, style: str, depth: int, batch: int, **asked: Any) -> Configuration:
    """One training configuration."""
    snapshot = asked.pop("snapshot", False)
    asked = {"style": style, "depth": depth, "batch": batch, **asked}
    return Configuration(name=name, kind="training", asked=asked, snapshot=snapshot)


def generation(name: str, style: str, depth: int, batch: int, **asked: Any) -> Configuration:
    """One generation configuration."""
    asked = {"style": style, "depth": depth, "batch": batch, **asked}
    return Configuration(name=name, kind="generation", asked=asked)


def scratch(group: str) -> Configuration:
    """Operations alone, to replace assumed scratch."""
    return Configuration(name=f"scratch-{group}", kind="scratch", asked={"group": group})


def boundary(name: str, style: str, depth: int, cap_gib: float, **asked: Any) -> Configuration:
    """The largest batch that fits into `cap_gib` of what PyTorch may hold."""
    asked = {"style": style, "depth": depth, "batch": 1, "cap_bytes": int(cap_gib * GIB), **asked}
    return Configuration(name=name, kind="boundary", asked=asked)


EAGER = (
    training("nano-d12-b8", "nanochat", 12, 8, snapshot=True),
    training("llama-d12-b8-adamw", "llama", 12, 8, optimizer="adamw"),
    training("gpt2-d12-b8-adamw", "gpt2", 12, 8, seq_len=1024, optimizer="adamw"),
    scratch("attention"),
    training("nano-d4-b32-plain", "nanochat", 4, 32, loss="plain", snapshot=True),
    training("nano-d12-b8-accum2", "nanochat", 12, 8, accumulation=2),
    training("llama-d12-b8-blocks", "llama", 12, 8, checkpoint="blocks"),
    training("nano-d12-b4-fp32", "nanochat", 12, 4, dtype="fp32"),
    training("gpt2-d12-b8-dropout", "gpt2", 12, 8, seq_len=1024, dropout=0.1),
    training("nano-d24-b4", "nanochat", 24, 4),
    scratch("weights"),
    boundary("boundary-nano-d8", "nanochat", 8, 8),
    training("nano-d8-b32-t512", "nanochat", 8, 32, seq_len=512),
    training("llama-d16-b4-t4096-kv1", "llama", 16, 4, seq_len=4096, kv_heads=1),
    training("gpt2-d4-b64-plain", "gpt2", 4, 64, seq_len=512, loss="plain", optimizer="adamw"),
    training("nano-d12-b1", "nanochat", 12, 1),
    training("llama-d6-b16-v512", "llama", 6, 16, vocab_size=512),
    training("nano-d12-b8-adamw-accum2-blocks", "nanochat", 12, 8, optimizer="adamw",
             accumulation=2, checkpoint="blocks"),
    training("llama-d8-b2-fp32-kv2", "llama", 8, 2, dtype="fp32", kv_heads=2, snapshot=True),
    training("nano-d20-b8-v65536", "nanochat", 20, 8, vocab_size=65536),
    training("nano-d12-b2-t8192", "nanochat", 12, 2, seq_len=8192),
    scratch("optimizer"),
    generation("generate-nano-d12-b8", "nanochat", 12, 8, prompt=1024, new=64),
    generation("generate-llama-d24-b1", "llama", 24, 1, prompt=4096, new=32),
    generation("generate-gpt2-d12-b32-fp32", "gpt2", 12, 32, prompt=512, new=32, dtype="fp32"),
    boundary("boundary-llama-d8-blocks", "llama", 8, 6, checkpoint="blocks", optimizer="adamw"),
    training("nano-d8-b3-t1000-windows", "nanochat", 8, 3, seq_len=1000, window_pattern="SL"),
    training("nano-d12-b32", "nanochat", 12, 32),
    training("gpt2-d6-b7-t777-v300", "gpt2", 6, 7, seq_len=777, vocab_size=300),
    training("llama-d24-b4-blocks-tied", "llama", 24, 4, checkpoint="blocks", tie=True),
)  # fmt: skip

PEER_SIZES = (
    # depth, batch, T, V, accumulation, compiled
    (12, 8, 2048, 32768, 1, False),
    (12, 8, 2048, 32768, 1, True),
    (12, 8, 2048, 32768, 2, True),
    (4, 32, 2048, 32768, 1, True),
    (12, 32, 2048, 32768, 1, True),
    (20, 4, 2048, 32768, 1, True),
    (8, 8, 1024, 65536, 2, False),
)


def compiled_set() -> tuple[Configuration, ...]:
    """The training configurations again, compiled, those that can be."""
    found = (c for c in EAGER if c.kind == "training" and _compiles(c.asked))
    return tuple(
        Configuration(name=f"{c.name}-compiled", kind="training",
                      asked={**c.asked, "compile": "on"}, snapshot=c.snapshot)
        for c in found
    )  # fmt: skip


def _compiles(asked: dict[str, Any]) -> bool:
    bf16 = asked.get("dtype", "bf16") == "bf16"
    card = Runtime(device="cuda", attention="flash" if bf16 else "efficient", capability=(9, 0))
    recipe = training_recipe(asked, batch=asked["batch"])
    return why_not_compiled(shape_of(asked), recipe, card) is None


def peer_set(checkout: str, stack: str) -> tuple[Configuration, ...]:
    """nanochat's own code at a few sizes, eager and compiled; `stack` is the checkout's version."""
    names = ("depth", "device_batch_size", "seq_len", "vocab_size", "accumulation", "compiled")
    found = []
    for sizes in PEER_SIZES:
        depth, batch, length, vocabulary, accumulation, compiled = sizes
        name = f"nanochat-d{depth}-b{batch}-t{length}-v{vocabulary}-a{accumulation}"
        asked = {**dict(zip(names, sizes, strict=True)), "checkout": checkout, "stack": stack}
        found.append(
            Configuration(name=f"{name}-{'compiled' if compiled else 'eager'}", kind="peer",
                          asked=asked)
        )  # fmt: skip
    return tuple(found)


def with_held_out(configurations: tuple[Configuration, ...]) -> tuple[Configuration, ...]:
    """Mark every third graded configuration; the others of the list do not count."""
    graded = [c.name for c in configurations if c.graded]
    held = set(graded[2::3])
    return tuple(
        Configuration(name=c.name, kind=c.kind, asked=c.asked, snapshot=c.snapshot,
                      held_out=c.name in held)
        for c in configurations
    )  # fmt: skip


def peer_question(asked: dict[str, Any]) -> tuple[ModelShape, TrainingRecipe]:
    """Shape and recipe of nanochat's code by the stack that models it."""
    version = find_stack(asked["stack"]).version
    if version is None:
        raise BadQuestionError(f"stack = {asked['stack']!r} is not a version of nanochat")
    sizes = {"seq_len": asked["seq_len"], "vocab_size": asked["vocab_size"]}
    recipe = nanochat_recipe(
        asked["stack"], seq_len=asked["seq_len"], device_batch_size=asked["device_batch_size"],
        grad_accum_steps=asked["accumulation"],
    )  # fmt: skip
    return nanochat_shape(version, asked["depth"], **sizes), recipe


def shape_of(asked: dict[str, Any], *, toy: bool = False) -> ModelShape:
    """The model of a configuration; `toy` keeps its style and levers and shrinks every size."""
    pinned = {
        key: asked[key]
        for key in ("vocab_size", "kv_heads", "dropout", "window_pattern", "tie")
        if key in asked
    }
    length = asked["prompt"] + asked["new"] if "new" in asked else asked.get("seq_len", SEQ_LEN)
    if not toy:
        return shape_for(asked["style"], asked["depth"], context_len=length, **pinned)
    pinned["vocab_size"] = 512
    heads = {"kv_heads": min(2, pinned.pop("kv_heads", 2))} if asked["style"] == "llama" else {}
    return shape_for(asked["style"], 2, context_len=64, width=64, heads=4, **heads, **pinned)


def training_recipe(asked: dict[str, Any], *, batch: int, toy: bool = False) -> TrainingRecipe:
    """The recipe of a training configuration at a batch; fp32 throughout where it is a toy."""
    length = 64 if toy else asked.get("seq_len", SEQ_LEN)
    accumulation = asked.get("accumulation", 1)
    levers = {name: asked[name] for name in LEVERS if name in asked and name not in STATED}
    schedule = msgspec.structs.replace(SCHEDULE, clip_norm=asked.get("clip_norm", 1.0))
    return TrainingRecipe(
        seq_len=length,
        device_batch_size=batch,
        grad_accum_steps=accumulation,
        total_batch_tokens=batch * length * accumulation,
        total_tokens=batch * length * accumulation * 10,
        compute_dtype="fp32" if toy else asked.get("dtype", "bf16"),
        loss=asked.get("loss", "chunked"),
        loss_chunk_tokens=32 if toy else CHUNK_TOKENS,
        checkpoint=asked.get("checkpoint", "none"),
        optimizer=asked.get("optimizer", "muon"),
        schedule=schedule,
        **levers,
    )


def generation_recipe(asked: dict[str, Any], *, toy: bool = False) -> GenerationRecipe:
    """The recipe of a generation configuration."""
    dtype = "fp32" if toy else asked.get("dtype", "bf16")
    return GenerationRecipe(
        batch=min(2, asked["batch"]) if toy else asked["batch"],
        prompt_tokens=24 if toy else asked["prompt"],
        max_new_tokens=4 if toy else asked["new"],
        kv_dtype=dtype,
        weight_dtype=dtype,
    )

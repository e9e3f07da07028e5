"""Random questions about training: a shape, a recipe and a runtime from a few named fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from msgspec.structs import replace

from snugpt.estimate.making_again import selective_sets
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, ModelShape, shape_for

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
RUNTIMES = {
    "cpu": (Runtime(device="cpu", attention="cpu", num_threads=3), "fp32"),
    "math": (Runtime(device="cpu", attention="math", num_threads=3), "fp32"),
    "flash": (Runtime(device="cuda", attention="flash", capability=(9, 0)), "bf16"),
    "efficient": (Runtime(device="cuda", attention="efficient", capability=(7, 5)), "fp16"),
    "efficient fp32": (Runtime(device="cuda", attention="efficient", capability=(6, 1)), "fp32"),
}


@st.composite
def levers(draw, lengths: Sequence[int] = (64, 100, 256, 777, 1024)) -> dict[str, Any]:
    style = draw(st.sampled_from(STYLES))
    runtime = draw(st.sampled_from(sorted(RUNTIMES)))
    drops = style == "gpt2" and runtime != "cpu" and draw(st.booleans())
    compiles = runtime == "flash" and not drops and draw(st.booleans())
    checkpoint = draw(st.sampled_from(["none", *([] if compiles else ["selective"]), "blocks"]))
    steps: tuple[str, ...] = ()
    if checkpoint == "selective":
        sets = selective_sets(shape_for(style, 2))
        steps = draw(st.sampled_from([s for s in sets if runtime != "math" or "qkv" not in s]))
    return {
        "style": style,
        "depth": draw(st.integers(1, 12)),
        "seq_len": draw(st.sampled_from(lengths)),
        "vocab_size": draw(st.sampled_from([300, 4096, 32768])),
        "tie": draw(st.booleans()),
        "dropout": 0.1 if drops else 0.0,
        "runtime": runtime,
        "optimizer": draw(st.sampled_from(["muon", "adamw"])),
        "checkpoint": checkpoint,
        "selective_steps": steps,
        "loss": draw(st.sampled_from(["chunked", "plain"])),
        "accumulation": draw(st.sampled_from([1, 2, 8])),
        "compile": "on" if compiles else "off",
    }


def question(asked: dict[str, Any], batch: int = 1) -> tuple[ModelShape, TrainingRecipe, Runtime]:
    runtime, dtype = RUNTIMES[asked.get("runtime", "cpu")]
    T, accumulation = asked.get("seq_len", 256), asked.get("accumulation", 1)
    width = asked.get("width", 64 * asked.get("depth", 4))
    shape = shape_for(
        asked["style"],
        asked.get("depth", 4),
        context_len=asked.get("context_len", T),
        width=width,
        vocab_size=asked.get("vocab_size", 4096),
        tie=asked.get("tie"),
        dropout=asked.get("dropout"),
    )
    recipe = TrainingRecipe(
        seq_len=T,
        device_batch_size=batch,
        grad_accum_steps=accumulation,
        total_batch_tokens=batch * T * accumulation,
        total_tokens=10 * batch * T * accumulation,
        compute_dtype=dtype,
        loss=asked.get("loss", "chunked"),
        loss_chunk_tokens=min(T, asked.get("chunk", 64)),
        checkpoint=asked.get("checkpoint", "none"),
        selective_steps=asked.get("selective_steps", ()),
        compile=asked.get("compile", "off"),
        optimizer=asked.get("optimizer", "muon"),
        schedule=replace(SCHEDULE, clip_norm=asked.get("clip_norm", 1.0)),
    )
    return shape, recipe, runtime

"""Random recipes over all that a recipe can say: the same seed gives the same one."""

from __future__ import annotations

import random
from itertools import combinations

from msgspec.structs import replace
from recorder import SCHEDULE

from snugpt.estimate.levers import why_not
from snugpt.spec.recipe import SELECTIVE_STEPS, GenerationRecipe, Recipe, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, ModelShape, shape_for

FP8_SHARE = 0.7  # of those recipes whose products can be taken in it
MOST_CHUNKS = 12  # each is a dozen operations to trace
MOST_WEIGHTS = 131_072 * 512
RUNTIMES: tuple[tuple[str, Runtime], ...] = (
    ("bf16", Runtime(device="cuda", attention="flash", capability=(9, 0))),
    ("bf16", Runtime(device="cuda", attention="flash", capability=(8, 6))),
    ("fp16", Runtime(device="cuda", attention="efficient", capability=(7, 5))),
    ("fp32", Runtime(device="cuda", attention="efficient", capability=(6, 1))),
    ("fp32", Runtime(device="cpu", attention="cpu", num_threads=3)),
)
Fuzzed = tuple[ModelShape, Recipe, Runtime]


def fuzzed(seed: int) -> Fuzzed:
    """One random question; a fifth of them generate."""
    draw = random.Random(seed)
    dtype, runtime = draw.choice(RUNTIMES)
    generates = draw.random() < 0.2
    shape = random_shape(draw, drops=not generates)
    if shape.dropout and runtime.device == "cpu":
        runtime = Runtime(device="cpu", attention="math", num_threads=3)
    if generates:
        new = draw.randint(1, max(1, shape.context_len // 2))
        return shape, generation(draw, shape, new, dtype), runtime
    recipe = training(draw, shape, dtype, runtime)
    while (objection := why_not(shape, recipe, runtime)) is not None:
        recipe = replace(recipe, **{objection.lever: objection.instead})
    fp8 = replace(recipe, fp8="on")
    if draw.random() < FP8_SHARE and why_not(shape, fp8, runtime) is None:
        recipe = fp8
    return shape, recipe, runtime


def random_shape(draw: random.Random, *, drops: bool) -> ModelShape:
    style = draw.choice(STYLES)
    heads = draw.choice([1, 2, 4, 6, 8])
    width = heads * draw.choice([16, 32, 64, 128])
    kv_heads = draw.choice([n for n in range(1, heads + 1) if heads % n == 0])
    vocab = draw.choice([256, 300, 1024, 5000, 32768, 50304, 131_072])
    while vocab * width > MOST_WEIGHTS:
        vocab //= 2
    return shape_for(
        style,
        draw.randint(1, 4),
        context_len=draw.choice([128, 200, 256, 777, 1024, 2048, 4096, 8192]),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        mlp=draw.choice([None, 4 * width, 3 * width + 8, 16]),
        vocab_size=vocab,
        tie=draw.choice([None, True, False]),
        dropout=0.1 if drops and draw.random() < 0.2 else 0.0,
        window_pattern=draw.choice(["L", "S", "SL", "SSSL"]),
    )


def sets_of_steps(style: str, attention: str = "cpu") -> list[tuple[str, ...]]:
    """Every set of steps of `checkpoint = selective` that is not refused."""
    refused = {"pointwise"} if style == "nanochat" else set()
    refused |= {"qkv"} if attention == "math" else set()
    steps = [step for step in SELECTIVE_STEPS if step not in refused]
    return [chosen for n in range(1, 4) for chosen in combinations(steps, n)]


def training(
    draw: random.Random, shape: ModelShape, dtype: str, runtime: Runtime
) -> TrainingRecipe:
    T = draw.choice([shape.context_len, max(1, shape.context_len // 2), 129])
    T = min(T, shape.context_len)
    batch, accumulation = draw.choice([1, 2, 3, 8, 17, 64]), draw.choice([1, 2, 2, 3])
    chunk = draw.choice([1, 100, 1024, 8192])
    chunk = max(chunk, batch * T // MOST_CHUNKS)
    checkpoint = draw.choice(["none", "selective", "blocks"])
    steps = draw.choice(sets_of_steps(shape.style, runtime.attention))
    return TrainingRecipe(
        seq_len=T,
        device_batch_size=batch,
        grad_accum_steps=accumulation,
        total_batch_tokens=batch * T * accumulation,
        total_tokens=batch * T * accumulation * 10,
        compute_dtype=dtype,
        loss=draw.choice(["chunked", "plain"]),
        loss_chunk_tokens=chunk,
        checkpoint=checkpoint,
        selective_steps=steps if checkpoint == "selective" else (),
        optimizer=draw.choice(["muon", "adamw"]),
        state_dtype=draw.choice(["fp32", "bf16", "int8"]),
        weight_dtype=draw.choice(["master", "master", "bf16"]),
        schedule=replace(SCHEDULE, clip_norm=draw.choice([1.0, 0.0])),
        offload=draw.choice(["none", "none", "optimizer", "activations"]),
    )


def generation(draw: random.Random, shape: ModelShape, new: int, dtype: str) -> GenerationRecipe:
    prompt = draw.randint(1, max(1, shape.context_len - new))
    batch = draw.choice([1, 2, 7, 32])
    return GenerationRecipe(
        batch=batch, prompt_tokens=prompt, max_new_tokens=new, kv_dtype=dtype, weight_dtype=dtype
    )

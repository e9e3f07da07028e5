"""Speed: bands in order, and better hardware never slower."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_questions import levers, question

from snugpt.estimate.flops import executed_flops_per_token
from snugpt.estimate.speed import dense_rate, speed_estimate, step_time_s, training_rate
from snugpt.spec.gpu import Gpu
from snugpt.spec.recipe import GenerationRecipe, Recipe
from snugpt.spec.shape import ModelShape
from snugpt.units import GIB

careful = settings(deadline=None, derandomize=True)
CARD = Gpu(
    id="card", name="card", backend="cuda", memory_bytes=24 * GIB, usable_bytes=23 * GIB,
    bandwidth_bytes_per_s=1e12, flops={"fp32": 3e13, "tf32": 6e13, "bf16": 1.2e14},
    capability=(8, 9),
)  # fmt: skip
PROCESSOR = msgspec.structs.replace(
    CARD, backend="cpu", flops={"fp32": 2e11}, bandwidth_bytes_per_s=2e10, capability=None
)


@st.composite
def asked(draw) -> tuple[ModelShape, Recipe]:
    shape, recipe, _ = question(draw(levers(lengths=(64, 256, 777))))
    if draw(st.booleans()):
        return shape, recipe
    generated = GenerationRecipe(
        batch=draw(st.integers(1, 64)), prompt_tokens=10, max_new_tokens=draw(st.integers(1, 50)),
        kv_dtype="bf16", weight_dtype="bf16",
    )  # fmt: skip
    return shape, generated


def faster(gpu: Gpu, *, compute: float = 1.0, bandwidth: float = 1.0) -> Gpu:
    flops: dict[Any, float] = {dtype: rate * compute for dtype, rate in gpu.flops.items()}
    return msgspec.structs.replace(
        gpu, flops=flops, bandwidth_bytes_per_s=gpu.bandwidth_bytes_per_s * bandwidth
    )


@careful
@given(asked(), st.sampled_from([CARD, PROCESSOR]), st.floats(1.0, 100.0), st.floats(1.0, 100.0))
def test_more_flops_or_bandwidth_are_never_slower(asked, gpu, compute, bandwidth) -> None:
    shape, recipe = asked
    before = speed_estimate(shape, recipe, gpu)
    after = speed_estimate(shape, recipe, faster(gpu, compute=compute, bandwidth=bandwidth))
    for band in ("low", "expected", "high"):
        assert getattr(after.tokens_per_s, band) >= getattr(before.tokens_per_s, band) * (1 - 1e-12)
    assert after.step_s <= before.step_s * (1 + 1e-12)
    assert after.hours <= before.hours * (1 + 1e-12)


@careful
@given(asked(), st.sampled_from([CARD, PROCESSOR]))
def test_bands_are_in_order_and_agree_with_the_step(asked, gpu) -> None:
    shape, recipe = asked
    speed = speed_estimate(shape, recipe, gpu)
    assert 0 < speed.tokens_per_s.low <= speed.tokens_per_s.expected <= speed.tokens_per_s.high
    generates = isinstance(recipe, GenerationRecipe)
    tokens = recipe.batch if generates else recipe.total_batch_tokens
    assert speed.tokens_per_s.expected == pytest.approx(tokens / speed.step_s)
    steps = recipe.max_new_tokens if generates else recipe.num_steps
    assert speed.hours == pytest.approx(steps * speed.step_s / 3600)
    assert speed.basis == "assumed"


def test_a_measured_rate_stands_for_the_assumed_share() -> None:
    shape, recipe, _ = question({"style": "nanochat", "depth": 12, "seq_len": 1024})
    rate = training_rate(CARD, recipe, 4e13)
    assert rate.basis == "fitted"
    assert rate.flops_per_s.low < rate.flops_per_s.expected == 4e13 < rate.flops_per_s.high
    speed = speed_estimate(shape, recipe, CARD, measured_flops_per_s=4e13)
    assert speed.step_s == step_time_s(shape, recipe, CARD, 4e13)
    assert speed.basis == "fitted"


def test_the_dense_rate_is_that_of_the_number_format() -> None:
    assert dense_rate(CARD, "bf16") == 1.2e14
    assert dense_rate(CARD, "fp32") == CARD.flops["fp32"]  # TF32 is off unless asked for
    assert dense_rate(PROCESSOR, "bf16") == 2e11  # no fast path: fp32's


def test_recomputing_is_slower_and_a_longer_step_takes_longer() -> None:
    shape, plain, _ = question({"style": "llama", "depth": 12, "seq_len": 1024})
    _, blocks, _ = question(
        {"style": "llama", "depth": 12, "seq_len": 1024, "checkpoint": "blocks"}
    )
    _, twice, _ = question({"style": "llama", "depth": 12, "seq_len": 1024, "accumulation": 2})
    step_s = step_time_s(shape, plain, CARD, 4e13)
    assert step_s < step_time_s(shape, blocks, CARD, 4e13) < 1.4 * step_s
    assert step_s < step_time_s(shape, twice, CARD, 4e13) < 2 * step_s


def test_decoding_a_small_batch_is_paced_by_bandwidth() -> None:
    shape, _, _ = question({"style": "llama", "depth": 24, "seq_len": 1024})
    recipe = GenerationRecipe(
        batch=1, prompt_tokens=10, max_new_tokens=90, kv_dtype="bf16", weight_dtype="bf16"
    )
    base = speed_estimate(shape, recipe, CARD).step_s
    assert speed_estimate(shape, recipe, faster(CARD, compute=4)).step_s == base
    assert speed_estimate(shape, recipe, faster(CARD, bandwidth=2)).step_s < 0.85 * base


def test_a_large_step_takes_the_time_of_its_arithmetic() -> None:
    shape, recipe, _ = question({"style": "nanochat", "depth": 12, "seq_len": 1024})
    large = msgspec.structs.replace(
        recipe, device_batch_size=512, total_batch_tokens=512 * recipe.total_batch_tokens
    )
    arithmetic_s = executed_flops_per_token(shape, large) * large.total_batch_tokens / 4e13
    assert arithmetic_s < step_time_s(shape, large, CARD, 4e13) < 1.05 * arithmetic_s


@pytest.mark.parametrize(("depth", "tokens", "pays"), [(4, 256, False), (12, 65536, True)])
@pytest.mark.parametrize("style", ["nanochat", "llama"])
def test_fp8_pays_where_products_are_large_and_never_more_than_was_published(
    style: str, depth: int, tokens: int, pays: bool
) -> None:
    shape, recipe, _ = question({"style": style, "depth": depth, "seq_len": 256}, tokens // 256)
    low = msgspec.structs.replace(recipe, fp8="on")
    times = [speed_estimate(shape, each, CARD).step_s for each in (recipe, low)]
    assert (times[1] < times[0]) is pays
    assert times[0] < 1.17 * times[1]

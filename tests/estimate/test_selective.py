"""`checkpoint = selective` in the estimate: what a layer keeps, by hand; sets worth trying."""

from __future__ import annotations

from itertools import combinations

import pytest
from msgspec.structs import replace
from training_questions import question

from snugpt.estimate.flops import (
    executed_flops_per_token,
    forward_flops_per_token,
    multiplied_again,
    recompute_factor,
    recomputed_flops_per_token,
    traffic_again_bytes_per_token,
    training_flops_per_token,
)
from snugpt.estimate.levers import why_not
from snugpt.estimate.making_again import making_again, selective_sets
from snugpt.estimate.memory import timeline_of
from snugpt.estimate.operations import Net
from snugpt.estimate.stacks.snugpt import layer_part
from snugpt.estimate.walk import forward
from snugpt.spec.recipe import SELECTIVE_STEPS
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, ModelShape, shape_for

FLASH = Runtime(device="cuda", attention="flash", capability=(9, 0))
T, BF16, FP32 = 256, 2, 4
SETS = [steps for n in range(4) for steps in combinations(SELECTIVE_STEPS, n)]


def shape_of(style: str) -> ModelShape:
    """No grouped heads; an mlp of 4 widths but for llama, whose two projections have 8/3 each."""
    mlp = 512 if style == "llama" else None
    return shape_for(style, 2, width=192, heads=2, kv_heads=2, mlp=mlp, vocab_size=300)


def kept_per_token(shape: ModelShape, layer: int, steps: tuple[str, ...]) -> float:
    """Bytes per token that a layer's forward pass leaves behind in bf16; its result is the next
    layer's to keep, as its input was its own."""
    net = Net(shape, FLASH, "bf16", T)
    part = making_again(layer_part(net, layer), steps)
    events = forward(part.operations, part.entry, keep=True, made_again=part.made_again)
    return sum(sign * buffer.sequence_bytes for sign, buffer in events) / T


def kept_by_both(shape: ModelShape, steps: tuple[str, ...]) -> float:
    """Of the two layers, one of which mixes values with embeddings in nanochat style."""
    return kept_per_token(shape, 0, steps) + kept_per_token(shape, 1, steps)


@pytest.mark.parametrize(
    ("steps", "channels"), [((), 20), (("qkv",), 14), (("up",), 12), (("qkv", "up"), 6)]
)
def test_a_nanochat_layer_keeps_20_14_12_or_6_bytes_per_token_and_channel(steps, channels):
    shape = shape_of("nanochat")
    C, H = shape.model_dim, shape.num_heads
    statistics = FP32 * (2 + 2 * H + H)  # two norms, the heads' norms, attention
    plain, mixing = 0, 1
    assert [shape.has_value_embedding(layer) for layer in (plain, mixing)] == [False, True]
    assert kept_per_token(shape, plain, steps) == channels * C + statistics
    embeddings = 0 if "qkv" in steps else BF16 * C
    gates = BF16 * H
    assert kept_per_token(shape, mixing, steps) == channels * C + statistics + embeddings + gates


@pytest.mark.parametrize("steps", SETS, ids="-".join)
def test_a_gpt2_layer_keeps_what_its_steps_leave(steps):
    shape = shape_of("gpt2")
    C, H = shape.model_dim, shape.num_heads
    channels = 2 + 2 + 2  # the inputs of both norms, attention's output
    channels += 0 if "pointwise" in steps else 2 + 2  # the norms' outputs
    channels += 0 if "qkv" in steps else 6
    channels += 0 if "up" in steps else 8  # what the activation reads
    channels += 0 if {"up", "pointwise"} & set(steps) else 8  # what it makes
    statistics = FP32 * (2 * 2 + H)
    assert kept_per_token(shape, 0, steps) == channels * C + statistics


@pytest.mark.parametrize("steps", SETS, ids="-".join)
def test_a_llama_layer_keeps_what_its_steps_leave(steps):
    shape = shape_of("llama")
    C, H, M = shape.model_dim, shape.num_heads, shape.mlp_dim
    kept = 6 * C
    kept += 0 if "pointwise" in steps else 4 * C
    kept += 0 if "qkv" in steps else 6 * C
    kept += 0 if "up" in steps else 2 * BF16 * M
    kept += 0 if {"up", "pointwise"} & set(steps) else BF16 * M
    assert kept_per_token(shape, 0, steps) == kept + FP32 * (2 + H)
    if steps == ("pointwise",):
        assert kept == pytest.approx((22 + 2 / 3) * C)


@pytest.mark.parametrize("style", STYLES)
def test_every_set_worth_trying_keeps_less_than_the_cheaper_one_before(style):
    shape = shape_of(style)
    sets = selective_sets(shape)
    kept = {steps: kept_by_both(shape, steps) for steps in ((), *sets)}
    cost = [multiplied_again(shape, steps) for steps in sets]
    assert cost == sorted(cost)
    assert list(kept.values()) == sorted(kept.values(), reverse=True)
    assert len(set(kept.values())) == len(kept)
    for steps in sets:  # each step lowers something
        for left_out in steps:
            rest = tuple(step for step in steps if step != left_out)
            assert kept_by_both(shape, rest) > kept[steps]


def test_the_sets_of_each_style():
    plain = (("qkv",), ("up",), ("qkv", "up"))
    assert selective_sets(shape_of("nanochat")) == plain
    for style in ("gpt2", "llama"):
        more = tuple(("pointwise", *steps) for steps in plain)
        assert selective_sets(shape_of(style)) == (("pointwise",), *more)


def asked(style: str, steps: str, **fields):
    levers = {"checkpoint": "selective", "selective_steps": tuple(steps.split(","))}
    return question({"style": style, **levers, **fields})


@pytest.mark.parametrize(
    ("style", "steps", "fields", "because"),
    [
        ("nanochat", "pointwise", {}, "pointwise saves nothing in nanochat style"),
        ("nanochat", "pointwise,up", {}, "pointwise saves nothing in nanochat style"),
        ("gpt2", "qkv", {"runtime": "math", "dropout": 0.1}, "dropout on the CPU"),
        ("llama", "up", {"runtime": "flash", "compile": "on", "depth": 3}, "choose for themselves"),
        ("nanochat", "qkv,up", {}, None),
        ("gpt2", "pointwise,up", {"runtime": "math", "dropout": 0.1}, None),
        ("gpt2", "qkv", {"runtime": "efficient", "dropout": 0.1}, None),
        ("llama", "pointwise,qkv,up", {"runtime": "flash"}, None),
    ],
)
def test_what_is_refused_says_why(style, steps, fields, because):
    found = why_not(*asked(style, steps, **fields))
    if because is None:
        assert found is None
    else:
        assert found is not None
        assert (found.lever, found.value, found.instead) == ("checkpoint", "selective", "none")
        assert because in found.because


def test_the_products_of_a_step_by_hand():
    shape, recipe, _ = asked("llama", "qkv,up", depth=3)
    C, KD, M = shape.model_dim, shape.kv_dim, shape.mlp_dim
    assert multiplied_again(shape, ("pointwise",)) == 0
    assert multiplied_again(shape, ("qkv",)) == 3 * (C * C + 2 * KD * C)
    assert multiplied_again(shape, ("up",)) == 3 * 2 * M * C
    both = 2 * 3 * (C * C + 2 * KD * C + 2 * M * C)
    assert recomputed_flops_per_token(shape, recipe) == both
    counted = training_flops_per_token(shape, recipe.seq_len)
    assert executed_flops_per_token(shape, recipe) == counted + both
    layers = forward_flops_per_token(shape, recipe.seq_len) - 2 * shape.vocab_size * C
    assert recompute_factor(shape, recipe) == pytest.approx(1 + both / (3 * layers))


def test_a_value_gate_is_multiplied_again_with_its_values():
    shape = shape_of("nanochat")
    C = shape.model_dim
    assert multiplied_again(shape, ("qkv",)) == 2 * 3 * C * C + 2 * 12  # one of two layers mixes


@pytest.mark.parametrize("style", STYLES)
def test_blocks_compute_a_third_more_in_the_layers(style):
    shape, blocks, _ = question({"style": style, "checkpoint": "blocks"})
    assert recompute_factor(shape, blocks) == pytest.approx(4 / 3)
    _, none, _ = question({"style": style})
    assert recompute_factor(shape, none) == 1.0


def test_pointwise_reads_and_writes_two_norms_and_the_activation():
    shape, recipe, _ = asked("llama", "pointwise", depth=3)
    C, M = shape.model_dim, shape.mlp_dim
    assert recipe.compute_dtype == "fp32"
    assert traffic_again_bytes_per_token(shape, recipe) == 3 * FP32 * (4 * C + 3 * M)
    _, with_up, _ = asked("llama", "pointwise,up", depth=3)
    assert traffic_again_bytes_per_token(shape, with_up) == 3 * FP32 * 4 * C
    _, without, _ = asked("llama", "qkv", depth=3)
    assert traffic_again_bytes_per_token(shape, without) == 0


def test_d24_needs_at_most_half_of_what_nanochat_compiled_needs():
    """B 16, T 2048, one GPU, accumulation above 1; weights and moments all fp32, unlike theirs."""
    shape = shape_for("nanochat", 24, context_len=2048)
    asked = {
        "style": "nanochat", "depth": 24, "seq_len": 2048, "accumulation": 2, "vocab_size": 32768,
        "runtime": "flash", "width": 1536,
    }  # fmt: skip
    found, plain, runtime = question(asked, 16)
    assert found == shape
    again = replace(plain, checkpoint="selective", selective_steps=("qkv", "up"))
    theirs = replace(
        plain, stack="nanochat@2026-07", loss="plain", compile="on", schedule=None
    )  # fmt: skip
    none, both, peer = (
        timeline_of(shape, recipe, runtime).read(16, workspace=False)[0].bytes
        for recipe in (plain, again, theirs)
    )
    assert both <= 0.5 * peer < none < 0.75 * peer

"""Floating-point operations against what nanochat prints for its models."""

from __future__ import annotations

import pytest

from snugpt.estimate.flops import (
    attention_flops_per_token,
    executed_flops_per_token,
    forward_flops_per_token,
    matmul_parameters,
    muon_flops,
    training_flops_per_token,
)
from snugpt.estimate.parameters import parameter_groups
from snugpt.spec.shape import STYLES, shape_for

# nanochat at 92d63d4 (2026-07-03), `estimate_flops` of the model built on the meta device, T 2048,
# as printed: three or four digits.
NANOCHAT = {
    4: (8.02e7, 0.005e7),
    8: (2.96e8, 0.005e8),
    12: (7.60e8, 0.005e8),
    16: (1.586e9, 0.0005e9),
    20: (2.886e9, 0.0005e9),
    24: (4.775e9, 0.0005e9),
    26: (5.991e9, 0.0005e9),
    28: (7.366e9, 0.0005e9),
    32: (1.0771e10, 0.00005e10),
}


@pytest.mark.parametrize("depth", NANOCHAT)
def test_training_flops_are_those_that_nanochat_prints(depth: int) -> None:
    printed, half_a_digit = NANOCHAT[depth]
    found = training_flops_per_token(shape_for("nanochat", depth), 2048)
    assert found == pytest.approx(printed, abs=half_a_digit, rel=1e-3)
    assert abs(found - printed) <= 1.2 * half_a_digit


def test_a_small_model_by_hand() -> None:
    shape = shape_for("llama", 2, width=64, heads=4, kv_heads=2, mlp=256, vocab_size=300)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 256  # query, output; key, value; gate, up, down
    assert matmul_parameters(shape) == 2 * layer + 300 * 64
    assert attention_flops_per_token(shape, 100) == 4 * 64 * 100 * 2
    assert forward_flops_per_token(shape, 100) == 2 * (2 * layer + 300 * 64) + 4 * 64 * 200
    assert training_flops_per_token(shape, 100) == 3 * forward_flops_per_token(shape, 100)


def test_short_windows_count_as_short() -> None:
    shape = shape_for("nanochat", 4, context_len=2048)
    assert [shape.window_tokens(layer) for layer in range(4)] == [512, 512, 512, None]
    assert attention_flops_per_token(shape, 2048) == 4 * 256 * (3 * 512 + 2048)
    assert attention_flops_per_token(shape, 300) == 4 * 256 * 4 * 300


@pytest.mark.parametrize("style", STYLES)
def test_embeddings_are_looked_up_and_cost_nothing(style) -> None:
    shape = shape_for(style, 6, tie=False)
    groups = parameter_groups(shape)
    assert matmul_parameters(shape) == groups["matrices"] + groups["head"]
    tied = shape_for(style, 6, tie=True)
    assert matmul_parameters(tied) == matmul_parameters(shape)


@pytest.mark.parametrize("style", STYLES)
def test_recomputing_blocks_adds_the_layers_forward_pass(style) -> None:
    from training_questions import question

    shape, plain, _ = question({"style": style})
    _, blocks, _ = question({"style": style, "checkpoint": "blocks"})
    counted = training_flops_per_token(shape, plain.seq_len)
    assert executed_flops_per_token(shape, plain) == counted
    more = executed_flops_per_token(shape, blocks) - counted
    head = 2 * shape.vocab_size * shape.model_dim
    assert more == forward_flops_per_token(shape, plain.seq_len) - head
    assert counted < counted + more < 4 / 3 * counted


def test_muon_costs_five_iterations_of_three_products_per_matrix() -> None:
    shape = shape_for("gpt2", 1, width=64)
    square = 2 * 64 * 64 * 64 * 3  # gram, its square, and the product with x
    wide = 2 * 64 * 64 * (256 + 64 + 256)
    assert muon_flops(shape) == 5 * (4 * square + 2 * wide)

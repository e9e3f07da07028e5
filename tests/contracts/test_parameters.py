"""Counted parameters against the module itself, built without memory on the meta device."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snugpt.estimate import parameters
from snugpt.model.build import build, group_of
from snugpt.model.gpt import GPT
from snugpt.planner.answer import plan
from snugpt.spec.presets import presets
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, ModelShape, shape_for

# Unmodified nanochat on the meta device, July 2026: wte, value_embeds, lm_head, matrices
NANOCHAT = {
    4: (8_388_608, 16_777_216, 8_388_608, 3_145_776),
    8: (16_777_216, 67_108_864, 16_777_216, 25_166_016),
    12: (25_165_824, 150_994_944, 25_165_824, 84_935_088),
    16: (33_554_432, 268_435_456, 33_554_432, 201_327_360),
    20: (41_943_040, 419_430_400, 41_943_040, 393_217_200),
    24: (50_331_648, 603_979_776, 50_331_648, 679_478_976),
    26: (54_525_952, 708_837_376, 54_525_952, 863_897_580),
    28: (58_720_256, 822_083_584, 58_720_256, 1_078_987_056),
    32: (67_108_864, 1_073_741_824, 67_108_864, 1_610_615_808),
}


@st.composite
def shapes(draw) -> ModelShape:
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(6, 24))
    vocab = draw(st.integers(1, 3000))
    return ModelShape(
        style=draw(st.sampled_from(STYLES)),
        num_layers=draw(st.integers(1, 9)),
        model_dim=heads * head_dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=draw(st.integers(1, 300)),
        vocab_size=vocab,
        padded_vocab_size=vocab + draw(st.integers(0, 100)),
        context_len=draw(st.integers(1, 600)),
        window_pattern=draw(st.sampled_from(["L", "SL", "SSSL"])),
        tied_embeddings=draw(st.booleans()),
        value_embeddings=draw(st.booleans()),
        logit_softcap=draw(st.sampled_from([None, 15.0])),
        dropout=draw(st.sampled_from([0.0, 0.1])),
    )


def module_of(shape: ModelShape) -> GPT:
    return build(shape, Runtime(device="cpu", attention="cpu"), device="meta")


def sizes_of(tensors) -> dict[str, tuple[int, ...]]:
    """A vector is counted as one row."""
    return {name: (1, *t.shape) if t.dim() == 1 else tuple(t.shape) for name, t in tensors}


def counted(weights: dict[str, parameters.Weight]) -> dict[str, tuple[int, ...]]:
    assert all(name == weight.name for name, weight in weights.items())
    return {name: (weight.rows, weight.columns) for name, weight in weights.items()}


def assert_counts_the_module(shape: ModelShape) -> None:
    module = module_of(shape)
    edges = sizes_of(module.named_parameters(recurse=False))
    assert counted(parameters.edge_weights(shape)) == edges
    for layer, block in enumerate(module.blocks):
        names = sizes_of(block.named_parameters())
        assert counted(parameters.layer_weights(shape, layer)) == names
    groups: Counter[str] = Counter()
    for name, tensor in module.named_parameters():
        groups[group_of(name)] += tensor.numel()
        assert parameters.group_of(name.rsplit(".", 1)[-1]) == group_of(name)
    assert parameters.parameter_groups(shape) == groups
    assert parameters.num_parameters(shape) == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("style", STYLES)
def test_names_sizes_and_groups_are_the_modules_at_every_depth_of_the_dial(style):
    for depth in range(4, 33):
        assert_counts_the_module(shape_for(style, depth))


@pytest.mark.parametrize("preset", presets())
def test_every_preset_has_the_parameters_that_its_plan_says(preset):
    made = plan(preset=preset, gpu="h200")
    assert_counts_the_module(made.shape)
    module = module_of(made.shape)
    assert made.parameters.total == sum(p.numel() for p in module.parameters())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(shapes())
def test_names_sizes_and_groups_are_the_modules_for_any_shape(shape):
    assert_counts_the_module(shape)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shapes())
def test_all_weights_lists_every_parameter_once(shape):
    listed = Counter((w.name, w.elements) for w in parameters.all_weights(shape))
    module = module_of(shape)
    held = ((name.rsplit(".", 1)[-1], p.numel()) for name, p in module.named_parameters())
    assert listed == Counter(held)


@pytest.mark.parametrize("depth", NANOCHAT)
def test_nanochat_groups_are_those_nanochat_prints(depth):
    names = ("embedding", "value_embedding", "head", "matrices")
    printed = dict(zip(names, NANOCHAT[depth], strict=True))
    assert parameters.parameter_groups(shape_for("nanochat", depth)) == printed


@pytest.mark.parametrize(
    ("depth", "millions"), [(12, 110.1), (20, 435.2), (24, 729.8), (26, 918.4)]
)
def test_nanochat_horizon_counts_matrices_and_head(depth, millions):
    assert round(parameters.scaling_parameters(shape_for("nanochat", depth)) / 1e6, 1) == millions


def test_other_horizons_leave_embeddings_and_head_out():
    for style in ("llama", "gpt2"):
        shape = shape_for(style, 6)
        module = module_of(shape)
        inner = sum(p.numel() for p in module.blocks.parameters()) + module.norm.numel()
        assert parameters.scaling_parameters(shape) == inner

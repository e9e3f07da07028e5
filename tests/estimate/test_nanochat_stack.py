"""The nanochat stacks: shapes, bytes in closed form, what collectives hold, and refused depths."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nanochat_recipes import (
    FEBRUARY,
    HOPPER,
    JULY,
    MARCH,
    NAMES,
    OCTOBER,
    recipe_for,
    shape_at,
    timeline_for,
)

from snugpt.errors import BadQuestionError
from snugpt.estimate.stacks.catalogue import STACKS, find_stack
from snugpt.estimate.stacks.nanochat.parameters import all_tensors, flops_per_token
from snugpt.spec.shape import ModelShape
from snugpt.units import MIB

careful = settings(max_examples=60, deadline=None, derandomize=True)
# Unmodified models on the meta device: depth -> October, February, July (March is July's model).
TOTALS = {
    4: (36_700_160, 36_700_296, 36_700_242),
    8: (92_274_688, 125_829_648, 125_829_354),
    12: (185_597_952, 286_262_424, 286_261_730),
    16: (335_544_320, 536_872_992, 536_871_738),
    20: (560_988_160, 896_535_720, 896_533_746),
    24: (880_803_840, 1_384_124_976, 1_384_122_122),
    26: (1_081_999_360, 1_681_790_292, 1_681_786_938),
    28: (1_313_865_728, 2_018_515_128, 2_018_511_234),
    32: (1_879_048_192, 2_818_580_544, 2_818_575_450),
}
# What nanochat prints as FLOPs per token, rounded: depth -> February, July.
FLOPS = {
    4: (8.49e7, 8.02e7),
    12: (8.02e8, 7.60e8),
    24: (4.945e9, 4.775e9),
    32: (11.073e9, 10.771e9),
}


def groups_of(name: str, shape: ModelShape) -> dict[str, int]:
    return {str(k): n for k, n in find_stack(name).parameter_groups(shape).items()}


@pytest.mark.parametrize("depth", TOTALS)
def test_parameter_counts_are_those_nanochat_prints(depth: int) -> None:
    october, february, july = TOTALS[depth]
    printed = {OCTOBER: october, FEBRUARY: february, MARCH: july, JULY: july}
    for name, total in printed.items():
        assert sum(groups_of(name, shape_at(name, depth)).values()) == total


def test_july_prints_its_groups() -> None:
    assert groups_of(JULY, shape_at(JULY, 12)) == {
        "embedding": 25_165_824, "value_embedding": 150_994_944, "head": 25_165_824,
        "matrices": 84_935_088, "scalars": 50,
    }  # fmt: skip


@pytest.mark.parametrize("depth", FLOPS)
def test_flops_per_token_are_those_nanochat_prints(depth: int) -> None:
    for name, printed in zip((FEBRUARY, JULY), FLOPS[depth], strict=True):
        version = find_stack(name).version
        assert version is not None
        assert flops_per_token(version, shape_at(name, depth)) == pytest.approx(printed, rel=1e-3)


def test_embeddings_are_bf16_and_the_rest_fp32() -> None:
    for name in NAMES:
        version = find_stack(name).version
        assert version is not None
        for tensor in all_tensors(version, shape_at(name, 6)):
            bf16 = tensor.group in ("embedding", "value_embedding")
            assert tensor.element_bytes == (2 if bf16 else 4)


def test_names_resolve_to_dated_versions() -> None:
    assert set(STACKS) == {"snugpt", *NAMES}
    assert find_stack("nanochat").name == find_stack(" NanoChat@2026-07").name == JULY
    with pytest.raises(BadQuestionError, match="did you mean 'nanochat@2026-03'"):
        find_stack("nanochat@2026-3")


def test_october_refuses_depths_whose_heads_do_not_divide() -> None:
    assert shape_at(OCTOBER, 15).head_dim == 120
    for depth in (5, 9, 11):
        with pytest.raises(BadQuestionError, match=f"depth = {depth} is not allowed"):
            shape_at(OCTOBER, depth)
    assert shape_at(FEBRUARY, 5).model_dim == 384  # rounded up instead


# The closed form of one step's peak on paper, apart from the walk. N tokens, C width, L layers,
# H heads, V vocabulary; the micro-step from Inductor's plans, the rest from the code.


def micro_step_bytes(name: str, shape: ModelShape, tokens: int, fp8: bool) -> int:
    C, L, H, V = shape.model_dim, shape.num_layers, shape.num_heads, shape.padded_vocab_size
    mixing = 0 if name == OCTOBER else ceil(L / 2)
    layer, edge = {OCTOBER: (36, 4), FEBRUARY: (38, 2), MARCH: (36, 6), JULY: (36, 6)}[name]
    if fp8:
        layer, edge = 25, 4
        mixed = 3  # its own value embedding, and 2 C of norm output in place of 1 C
    else:
        mixed = 2
    per_token = (layer * C + 12 * H + 8) * L + mixed * C * mixing + edge * C + 16 + 2 * H * mixing
    if fp8:
        return tokens * (per_token + 8 * V)
    return tokens * (per_token + 2 * V) + 2 * (12 * C * C * L + V * C) + 2 * V * C


def static_bytes(name: str, shape: ModelShape, ranks: int) -> tuple[int, int]:
    """Weights, and rank 0's optimizer state."""
    C, L, V = shape.model_dim, shape.num_layers, shape.padded_vocab_size
    values = 0 if name == OCTOBER else ceil(L / 2) * V * C
    own = sum(ceil(count / ranks) * size for count, size in (
        (4 * L, C * C), (L, 4 * C * C), (L, 4 * C * C)))  # fmt: skip
    weights = 4 * 12 * C * C * L + 6 * V * C + 2 * values
    return weights, 4 * own + (12 * V * C + 4 * values) // ranks


def held_bytes(name: str, shape: ModelShape, ranks: int) -> int:
    C, L, V = shape.model_dim, shape.num_layers, shape.padded_vocab_size
    adamw = 6 * V * C + (0 if name == OCTOBER else 2 * ceil(L / 2) * V * C)
    matrices = 12 * C * C * L
    own = sum(ceil(count / ranks) * size for count, size in (
        (4 * L, C * C), (L, 4 * C * C), (L, 4 * C * C)))  # fmt: skip
    padded = own * ranks
    if name == OCTOBER:
        lists = 4 * matrices + 8 * padded + 4 * (padded - matrices)
        return adamw + adamw // ranks + lists + 4 * 9 * C * C
    return adamw + adamw // ranks + 4 * padded + 8 * own


@careful
@given(
    name=st.sampled_from(NAMES),
    depth=st.sampled_from([2, 4, 6, 12, 13, 20]),
    batch=st.sampled_from([16, 32, 64]),
    ranks=st.sampled_from([1, 2, 4, 8]),
    launcher=st.sampled_from(["python", "torchrun"]),
    accumulation=st.sampled_from([1, 2, 7]),
    fp8=st.booleans(),
)
def test_the_walk_peaks_where_the_closed_form_says(
    name: str, depth: int, batch: int, ranks: int, launcher: str, accumulation: int, fp8: bool
) -> None:
    fp8 = fp8 and name in (MARCH, JULY)
    depth = 12 if name == OCTOBER and depth == 13 else depth
    launcher = "torchrun" if ranks > 1 else launcher
    shape = shape_at(name, depth)
    recipe = recipe_for(
        name, batch=batch, accumulation=accumulation, world_size=ranks, launcher=launcher, fp8=fp8
    )
    timeline = timeline_for(shape, recipe)
    alive, _ = timeline.read(batch)
    weights, state = static_bytes(name, shape, ranks)
    tokens = batch * 2048
    expected = micro_step_bytes(name, shape, tokens, fp8) + weights + state + 2 * 32 * MIB
    expected += weights if accumulation > 1 else 0
    if launcher == "torchrun" and not (name == JULY and ranks == 1):
        expected += held_bytes(name, shape, ranks)
    expected += 2 * 10 * 2048 * (shape.head_dim // 2) * 2 + 32 * tokens  # rotary tables, token ids
    assert alive.phase == "backward"
    assert alive.bytes == pytest.approx(expected, rel=2e-4, abs=0.5 * MIB)
    assert timeline.peak_bytes(batch) == alive.bytes


@careful
@given(
    name=st.sampled_from(NAMES),
    depth=st.sampled_from([1, 2, 6, 24]),
    ranks=st.sampled_from([1, 2, 8]),
    launcher=st.sampled_from(["python", "torchrun"]),
    accumulation=st.sampled_from([1, 2]),
    fp8=st.booleans(),
)
def test_a_step_ends_with_what_it_began_with(
    name: str, depth: int, ranks: int, launcher: str, accumulation: int, fp8: bool
) -> None:
    recipe = recipe_for(
        name, accumulation=accumulation, world_size=ranks, fp8=fp8 and name in (MARCH, JULY),
        launcher="torchrun" if ranks > 1 else launcher,
    )  # fmt: skip
    timeline = timeline_for(shape_at(name, depth), recipe)
    balance: dict[object, int] = {}
    lowest: dict[object, int] = {}
    for buffer in timeline.resident:
        balance[buffer] = balance.get(buffer, 0) + 1
    began = dict(balance)
    for _, _, (sign, buffer) in timeline.events():
        balance[buffer] = balance.get(buffer, 0) + sign
        lowest[buffer] = min(lowest.get(buffer, 0), balance[buffer])
    assert {b: n for b, n in balance.items() if n} == began
    assert min(lowest.values()) == 0  # nothing is freed that is not there


@pytest.mark.parametrize("name", NAMES)
def test_two_micro_steps_stand_for_any_number(name: str) -> None:
    shape = shape_at(name, 6)
    two, many = (
        timeline_for(shape, recipe_for(name, batch=4, accumulation=n)).read(4) for n in (2, 64)
    )
    one = timeline_for(shape, recipe_for(name, batch=4)).read(4)
    assert two[0].bytes == many[0].bytes
    gradients = sum(t.count * t.num_bytes for t in all_tensors(_version(name), shape))
    assert two[0].bytes - one[0].bytes == pytest.approx(gradients, rel=1e-3)


def _version(name: str):
    version = find_stack(name).version
    assert version is not None
    return version


def communication_bytes(name: str, launcher: str, ranks: int, depth: int = 12) -> int:
    recipe = recipe_for(name, batch=8, world_size=ranks, launcher=launcher)
    timeline = timeline_for(shape_at(name, depth), recipe)
    alive, _ = timeline.read(8)
    return sum(
        n * timeline.bytes_of(b, 8)
        for b, n in alive.buffers.items()
        if b.category == "communication"
    )


def test_only_torchrun_leaves_buffers_held() -> None:
    for name in NAMES:
        assert communication_bytes(name, "python", 1) == 0
        alone = communication_bytes(name, "torchrun", 1)
        assert (alone == 0) == (name == JULY)  # July skips the collectives of a single rank
        assert communication_bytes(name, "torchrun", 8) > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_held_bytes_follow_from_the_tensors_that_collectives_touch(name: str, ranks: int) -> None:
    held = communication_bytes(name, "torchrun", ranks)
    if name == JULY and ranks == 1:
        assert held == 0
        return
    assert held == pytest.approx(held_bytes(name, shape_at(name, 12), ranks), rel=1e-4)


def test_about_20_gb_are_held_at_32_layers_on_8_cards() -> None:
    decimal = {name: communication_bytes(name, "torchrun", 8, depth=32) / 1e9 for name in NAMES}
    assert 20 < decimal[OCTOBER] < 22
    assert 10 < decimal[JULY] < 13


def test_the_gradients_of_july_are_stacked_all_at_once_on_one_card() -> None:
    """a9d0a86 made one optimizer of two: stacks of all shapes are alive together."""
    march, july = (
        timeline_for(shape_at(name, 24), recipe_for(name, accumulation=2)).read(1)[1]["optimizer"]
        for name in (MARCH, JULY)
    )
    matrices = 12 * 1536**2 * 24
    assert july - march > 3 * matrices
    alive, _ = timeline_for(shape_at(JULY, 24), recipe_for(JULY, accumulation=2)).read(1)
    assert alive.phase == "optimizer"


def test_validation_never_needs_more_than_training() -> None:
    timeline = timeline_for(shape_at(FEBRUARY, 16), recipe_for(FEBRUARY, batch=32))
    _, phases = timeline.read(32)
    assert phases["evaluate"] < phases["backward"]
    # Inductor's plan of validation at 16 layers, batch 32: 4.50 GB beside what is resident
    resident = sum(timeline.bytes_of(b, 32) for b in timeline.resident)
    assert (phases["evaluate"] - resident) / 1e9 == pytest.approx(4.50, rel=0.02)


def test_each_handle_has_a_workspace_and_its_size_is_the_cards() -> None:
    shape, recipe = shape_at(JULY, 4), recipe_for(JULY)
    for capability, size in (((9, 0), 32 * MIB), ((8, 0), 8.125 * MIB)):
        runtime = type(HOPPER)(device="cuda", attention="flash", capability=capability)
        spaces = [
            b for b in timeline_for(shape, recipe, runtime).resident if b.name[:6] == "cuBLAS"
        ]
        assert [b.fixed_bytes for b in spaces] == [size, size]

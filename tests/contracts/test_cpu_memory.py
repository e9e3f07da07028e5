"""Predicted memory against torch's allocator, phase by phase, on real steps of the real model.

Predicted is the walk's timeline in pure Python, measured the allocations of a step that runs.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from fuzzed_steps import sets_of_steps
from recorder import cpu_runtime, measured_phases, recipe_for

from snugpt.estimate.parameters import num_parameters
from snugpt.estimate.training import TrainingStep
from snugpt.spec.shape import STYLES, ModelShape, shape_for

LOWEST_RATIO, HIGHEST_RATIO = 0.999, 1.001
SCALAR_BYTES = 64  # the few scalars of clipping and of the fused AdamW, left out of the walk
LEVERS = tuple(product(("muon", "adamw"), ("none", "blocks"), (1, 4), (512, 32768)))

pytestmark = pytest.mark.usefixtures("one_thread")


def small(style: str, **pinned) -> ModelShape:
    sizes = {"context_len": 96, "width": 64, "heads": 4, "vocab_size": 512}
    if style == "llama":
        sizes["kv_heads"] = 2
    return shape_for(style, pinned.pop("depth", 3), **(sizes | pinned))


def compare(shape: ModelShape, **asked) -> dict[str, tuple[int, int]]:
    """Predicted and measured bytes of each phase."""
    recipe = recipe_for(shape, **asked)
    measured = measured_phases(shape, recipe)
    timeline = TrainingStep(shape, recipe, cpu_runtime(shape)).timeline()
    at_peak, predicted = timeline.read(recipe.device_batch_size)
    assert predicted.keys() == measured.keys()
    assert at_peak.bytes == max(predicted.values())
    return {phase: (predicted[phase], measured[phase]) for phase in measured}


@cache
def compare_levers(style: str, optimizer: str, checkpoint: str, accumulation: int, vocab: int):
    return compare(
        small(style, vocab_size=vocab),
        batch=2,
        optimizer=optimizer,
        checkpoint=checkpoint,
        accumulation=accumulation,
    )


def assert_within_a_thousandth(phases: dict[str, tuple[int, int]]) -> None:
    ratios = {phase: predicted / measured for phase, (predicted, measured) in phases.items()}
    outside = {p: r for p, r in ratios.items() if not LOWEST_RATIO <= r <= HIGHEST_RATIO}
    assert not outside


def assert_to_the_byte(phases: dict[str, tuple[int, int]]) -> None:
    """But for the scalars; stricter than a ratio, which hides small tensors behind large ones."""
    off = {phase: predicted - measured for phase, (predicted, measured) in phases.items()}
    assert {p: n for p, n in off.items() if abs(n) > SCALAR_BYTES} == {}


@pytest.mark.parametrize("levers", LEVERS, ids=lambda levers: "-".join(map(str, levers)))
@pytest.mark.parametrize("style", STYLES)
def test_every_phase_is_predicted_within_a_thousandth(style, levers):
    assert_within_a_thousandth(compare_levers(style, *levers))


@pytest.mark.parametrize("style", STYLES)
def test_every_phase_is_predicted_to_the_byte_but_for_scalars(style):
    for levers in LEVERS:
        assert_to_the_byte(compare_levers(style, *levers))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_dropout_is_predicted_with_its_masks_and_random_states(optimizer, checkpoint, accumulation):
    shape = small("gpt2", dropout=0.1)
    levers = {"optimizer": optimizer, "checkpoint": checkpoint, "accumulation": accumulation}
    assert_to_the_byte(compare(shape, batch=2, **levers))


@pytest.mark.parametrize("style", STYLES)
def test_what_is_made_again_is_predicted(style):
    for steps in sets_of_steps(style):
        for depth in (1, 3):
            shape = small(style, depth=depth)
            assert_to_the_byte(compare(shape, batch=2, checkpoint="selective", steps=steps))


@pytest.mark.parametrize("vocab", [512, 8192])
@pytest.mark.parametrize("style", STYLES)
def test_plain_loss_holds_all_logits_at_once(style, vocab):
    shape = small(style, vocab_size=vocab)
    plain = compare(shape, batch=2, loss="plain")
    assert_to_the_byte(plain)
    logits_bytes = 2 * shape.context_len * vocab * 4
    assert plain["loss"][1] > logits_bytes


@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
@pytest.mark.parametrize("style", STYLES)
def test_products_in_fp8_are_predicted(style, checkpoint):
    fp8 = compare(small(style), batch=2, fp8="on", checkpoint=checkpoint)
    assert_to_the_byte(fp8)
    assert fp8["backward"] > compare(small(style), batch=2, checkpoint=checkpoint)["backward"]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("style", STYLES)
def test_grouped_heads_are_predicted(style, kv_heads):
    assert_to_the_byte(compare(small(style, kv_heads=kv_heads), batch=2))


@pytest.mark.parametrize("seq_len", [1, 33, 100, 200, 255])
@pytest.mark.parametrize("style", STYLES)
def test_lengths_that_fill_no_tile_are_predicted(style, seq_len):
    shape = small(style, context_len=256, vocab_size=500)
    chunk = 37 if seq_len > 37 else 3 * seq_len
    assert_to_the_byte(compare(shape, batch=3, seq_len=seq_len, chunk=chunk))


@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
@pytest.mark.parametrize(("pattern", "seq_len"), [("SSSL", 512), ("SL", 300), ("S", 130)])
def test_window_masks_are_predicted_where_a_window_is_exceeded(pattern, seq_len, checkpoint):
    shape = small("nanochat", context_len=512, window_pattern=pattern)
    assert shape.window_tokens(0) == 128
    assert_to_the_byte(compare(shape, batch=1, seq_len=seq_len, checkpoint=checkpoint))


def attention_heavy(style: str) -> ModelShape:
    """Where the kernel's scratch stands out: long sequences, next to no mlp, few words."""
    return small(style, depth=1, context_len=800, mlp=16, vocab_size=64)


@pytest.mark.parametrize("style", STYLES)
def test_long_sequences_use_larger_tiles_as_predicted(style):
    assert_to_the_byte(compare(attention_heavy(style), batch=1, chunk=100))


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
@pytest.mark.parametrize("style", STYLES)
def test_any_number_of_layers_is_predicted(style, checkpoint, depth):
    assert_to_the_byte(compare(small(style, depth=depth), batch=2, checkpoint=checkpoint))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("style", STYLES)
def test_embeddings_tied_or_not_are_predicted(style, accumulation):
    tied = style != "gpt2"  # the other way than the style's own
    assert_to_the_byte(compare(small(style, tie=tied), batch=2, accumulation=accumulation))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("style", STYLES)
def test_gradients_that_go_to_the_optimizer_in_backward_are_predicted(style, optimizer):
    shape, asked = small(style, vocab_size=4096), {"batch": 1, "seq_len": 32}
    together = compare(shape, optimizer=optimizer, **asked)
    each = compare(shape, optimizer=optimizer, clip_norm=0.0, **asked)
    assert_to_the_byte(each)
    assert each.keys() == together.keys() - {"clip", "optimizer"}
    accumulated = compare(shape, optimizer=optimizer, clip_norm=0.0, accumulation=2, **asked)
    assert_to_the_byte(accumulated)
    assert accumulated.keys() == together.keys() - {"clip"}
    # What remains of all gradients is the largest, with the head's, which is made first.
    saved = max(n for _, n in together.values()) - max(n for _, n in each.values())
    assert saved > 0.25 * 4 * num_parameters(shape)


@pytest.mark.parametrize("style", STYLES)
def test_evaluation_is_predicted_where_it_is_the_peak_of_its_logits(style):
    shape = small(style, vocab_size=4096)
    phases = compare(shape, batch=4, loss="plain")
    assert_to_the_byte({"evaluate": phases["evaluate"]})
    assert phases["evaluate"][1] < phases["loss"][1]


@pytest.mark.parametrize("style", STYLES)
def test_scratch_of_two_threads_is_predicted(style):
    torch.set_num_threads(2)
    try:
        phases = compare(attention_heavy(style), batch=1, chunk=100)
    finally:
        torch.set_num_threads(1)
    assert_to_the_byte(phases)

"""Predicted memory against the trace: the walk's operations against the code that runs.

Requested bytes, phase by phase, and every allocation in its order. A miss is a bug, never a factor.
"""

from __future__ import annotations

from collections import Counter

import pytest
from fuzzed_steps import fuzzed
from lever_pairs import LEVERS
from msgspec.structs import replace
from recorder import recipe_for

from snugpt.errors import BadQuestionError
from snugpt.estimate.comparison import Comparison, compare
from snugpt.estimate.host import host_bytes
from snugpt.estimate.memory import batch_of, timeline_of
from snugpt.estimate.stacks.catalogue import SNUGPT
from snugpt.spec.recipe import Recipe, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, ModelShape, shape_for
from snugpt.tracing.steps import trace, trace_training

NUM_FUZZED, BATCH = 160, 20  # bench/predicted_traced.py takes 5,000
LEAST_DRAWS = 5  # of every value of every lever
LARGEST_ERROR = 0.001
SCALAR_BYTES = 512  # blocks of a few numbers, and events that only those change, do not count
FLASH = Runtime(device="cuda", attention="flash", capability=(9, 0))


def both(shape: ModelShape, recipe: Recipe, runtime: Runtime) -> Comparison:
    predicted, traced = timeline_of(shape, recipe, runtime), trace(shape, recipe, runtime)
    on_host = sum(slab.fixed_bytes for slab in traced.host)
    assert host_bytes(predicted, batch_of(recipe)) == on_host
    return compare(predicted, batch_of(recipe), traced, smallest_bytes=SCALAR_BYTES)


def assert_agree(found: Comparison) -> None:
    pairs = {"peak": found.peak, **found.phases}
    off = {name: pair for name, pair in pairs.items() if abs(pair.ratio - 1) > LARGEST_ERROR}
    assert off == {}
    assert found.parting is None


@pytest.mark.parametrize("first", range(0, NUM_FUZZED, BATCH))
def test_predicted_is_traced_whatever_a_recipe_says(first):
    for seed in range(first, first + BATCH):
        assert_agree(both(*fuzzed(seed)))


@pytest.mark.parametrize("lever", [*LEVERS, "checkpoint"])
def test_these_recipes_have_every_value_of_every_lever(lever):
    recipes = [fuzzed(seed)[1] for seed in range(NUM_FUZZED)]
    drawn = Counter(getattr(r, lever) for r in recipes if isinstance(r, TrainingRecipe))
    assert drawn.keys() >= set(SNUGPT.levers[lever])
    assert min(drawn.values()) >= LEAST_DRAWS


@pytest.mark.parametrize("style", STYLES)
def test_two_micro_steps_stand_for_any_number(style):
    shape = shape_for(style, 2, context_len=128, width=64, heads=2, vocab_size=300)
    recipe = recipe_for(shape, batch=2, accumulation=5, dtype="bf16")
    short = trace_training(shape, recipe, FLASH).read(1)[1]
    assert trace_training(shape, recipe, FLASH, most_micro_steps=5).read(1)[1] == short


@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
@pytest.mark.parametrize("style", STYLES)
def test_products_in_fp8_are_predicted_off_cuda_as_they_are_traced(style, checkpoint):
    shape = shape_for(style, 2, context_len=160, width=64, heads=4, kv_heads=2, vocab_size=700)
    runtime = Runtime(device="cpu", attention="cpu", num_threads=1)
    recipe = recipe_for(shape, batch=2, accumulation=2, checkpoint=checkpoint, fp8="on")
    assert_agree(both(shape, recipe, runtime))


def test_a_first_step_would_miss_the_optimizers_state():
    shape = shape_for("llama", 2, context_len=128, width=64, heads=2, vocab_size=300)
    recipe = recipe_for(shape, batch=1, optimizer="adamw")
    timeline = trace(shape, recipe, FLASH)
    state = sum(b.fixed_bytes for b in timeline.resident if b.category == "optimizer")
    weights = sum(b.fixed_bytes for b in timeline.resident if b.name.startswith("weights:"))
    assert state == pytest.approx(2 * weights, rel=0.001)


def test_a_changed_operation_is_found_and_named():
    shape = shape_for("gpt2", 2, context_len=128, width=64, heads=2, vocab_size=300)
    wider = shape_for("gpt2", 2, context_len=128, width=64, heads=2, mlp=264, vocab_size=300)
    recipe = recipe_for(shape, batch=2)
    predicted, traced = timeline_of(shape, recipe, FLASH), trace(wider, recipe, FLASH)
    parting = compare(predicted, 2, traced).parting
    assert parting is not None
    assert parting.phase == "forward"
    assert parting.predicted is not None
    assert parting.predicted.name == "mlp inputs"
    assert parting.measured is not None
    assert "functions.py" in parting.measured.name


def test_a_compiled_recipe_is_refused_and_not_traced_as_another():
    shape = shape_for("llama", 2, context_len=128, width=64, heads=2, vocab_size=300)
    recipe = replace(recipe_for(shape, batch=1, dtype="bf16"), compile="on")
    with pytest.raises(BadQuestionError, match="not traced"):
        trace(shape, recipe, FLASH)

"""Small cards: a plan that fits, taken by the trainer's own step on the meta device."""

from __future__ import annotations

import pytest
from test_traced_memory import SCALAR_BYTES

import snugpt
from snugpt.estimate.comparison import compare
from snugpt.estimate.levers import why_not
from snugpt.estimate.memory import runtime_of, timeline_of
from snugpt.spec.recipe import TrainingRecipe
from snugpt.tracing.steps import trace_training

T = 2048
CARDS = [
    ("rtx-4090", 24, "bf16"), ("rtx-3060", 20, "bf16"), ("rtx-3070", 12, "bf16"),
    ("rtx-3050-laptop-4gb", 12, "bf16"), ("t4", 12, "fp16"), ("gtx-1060-6gb", 12, "fp16"),
]  # fmt: skip


@pytest.mark.parametrize(("gpu", "depth", "dtype"), CARDS)
def test_a_plan_for_a_small_card_fits_by_its_trace(gpu, depth, dtype):
    plan = snugpt.plan(gpu=gpu, depth=depth)
    recipe = plan.recipe
    assert isinstance(recipe, TrainingRecipe)
    assert plan.fits
    assert plan.memory.process_bytes.high <= plan.memory.capacity_bytes
    assert recipe.seq_len == T
    assert recipe.compute_dtype == dtype
    runtime = runtime_of(plan.shape, recipe, plan.gpu, 1)
    assert why_not(plan.shape, recipe, runtime) is None
    traced = trace_training(plan.shape, recipe, runtime)
    predicted = timeline_of(plan.shape, recipe, runtime)
    found = compare(predicted, recipe.device_batch_size, traced, smallest_bytes=SCALAR_BYTES)
    assert found.parting is None
    assert found.peak.predicted == pytest.approx(plan.memory.requested_bytes, rel=0.001)
    assert found.peak.ratio == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize(("gpu", "depth"), [("rtx-3050-laptop-4gb", 24), ("gtx-1060-6gb", 24)])
def test_what_does_not_fit_is_said_with_the_nearest_that_does(gpu, depth):
    plan = snugpt.plan(gpu=gpu, depth=depth)
    assert not plan.fits
    assert plan.memory.headroom_bytes < 0
    assert plan.alternatives[0].memory.fits

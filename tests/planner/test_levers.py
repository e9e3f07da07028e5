"""The search over levers: in which order they are pulled, and what is said of them."""

from __future__ import annotations

import pytest

import snugpt
from snugpt.errors import BadQuestionError
from snugpt.planner.levers import difference, in_words, is_exact, loses_nothing, tiers
from snugpt.spec.plan import Plan
from snugpt.spec.question import Question
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import shape_for

TIGHT = {"gpu": "rtx-3050-laptop-4gb", "depth": 12}


def recipe_of(plan: Plan) -> TrainingRecipe:
    assert isinstance(plan.recipe, TrainingRecipe)
    return plan.recipe


def test_what_fits_on_the_card_pulls_nothing_beyond_it():
    recipe = recipe_of(snugpt.plan(gpu="rtx-4090", depth=12))
    assert (recipe.offload, recipe.state_dtype, recipe.weight_dtype) == ("none", "fp32", "master")


def test_the_hosts_memory_comes_before_fewer_bits():
    plan = snugpt.plan(gpu="rtx-3060", depth=20)
    assert recipe_of(plan).offload == "optimizer"
    assert is_exact(recipe_of(plan))
    assert plan.reasons["offload"] == "nothing that stays on the card fits"


def test_fewer_bits_come_last_and_never_with_exact():
    plan = snugpt.plan(**TIGHT)
    assert plan.fits
    assert not is_exact(recipe_of(plan))
    assert "state_dtype int8 (inexact)" in in_words(recipe_of(plan))
    exact = snugpt.plan(**TIGHT, exact=True)
    assert not exact.fits
    assert is_exact(recipe_of(exact))


def test_an_inexact_lever_can_t_be_pinned_beside_exact():
    with pytest.raises(BadQuestionError, match="state_dtype = 'int8' is not allowed") as refused:
        snugpt.plan(**TIGHT, exact=True, state_dtype="int8")
    assert "--exact" not in refused.value.hint


def test_the_smallest_peak_is_the_smallest_of_all_that_is_exact():
    smallest = snugpt.plan(gpu="rtx-4090", depth=12, objective="memory")
    for changes in ({"checkpoint": "none"}, {"offload": "none"}, {"device_batch_size": 2}):
        other = snugpt.plan(gpu="rtx-4090", depth=12, objective="memory", **changes)
        assert smallest.memory.process_bytes.high <= other.memory.process_bytes.high
    assert is_exact(recipe_of(smallest))


def test_several_cards_divide_the_optimizers_state_where_one_would_do_without():
    plan = snugpt.plan(gpu="rtx-4090", depth=24, num_gpus=2)
    assert plan.fits
    assert recipe_of(plan).sharding == "optimizer"
    assert plan.command.startswith("torchrun ")


def test_several_old_cards_compute_in_fp32_by_themselves():
    assert recipe_of(snugpt.plan(gpu="t4", depth=4)).compute_dtype == "fp16"
    assert recipe_of(snugpt.plan(gpu="t4", depth=4, num_gpus=2)).compute_dtype == "fp32"


@pytest.mark.parametrize("steps", ["nonsense", "", "qkv,nonsense"])
def test_steps_that_are_none_are_refused_with_those_there_are(steps):
    with pytest.raises(BadQuestionError, match="pointwise, qkv, up"):
        snugpt.plan(gpu="rtx-4090", depth=4, selective_steps=steps)


def test_pinned_steps_are_taken_in_their_order():
    recipe = recipe_of(snugpt.plan(gpu="rtx-4090", depth=4, selective_steps="up, qkv"))
    assert (recipe.checkpoint, recipe.selective_steps) == ("selective", ("qkv", "up"))


def test_steps_beside_another_way_to_checkpoint_are_refused():
    with pytest.raises(BadQuestionError, match="checkpoint = 'selective'"):
        snugpt.plan(gpu="rtx-4090", depth=4, checkpoint="blocks", selective_steps="qkv")


def test_tiers_go_from_exact_to_inexact_and_leave_out_what_is_pinned():
    shape = shape_for("llama", 4)
    found = list(tiers(Question(), shape))
    losing = [not loses_nothing(tier, Question()) for tier in found]
    assert losing == sorted(losing)
    assert any(losing)
    pinned = Question(offload="none", state_dtype="fp32", weight_dtype="master")
    assert len(list(tiers(pinned, shape))) == 1


def test_two_recipes_differ_by_their_levers_in_words():
    recipe = recipe_of(snugpt.plan(gpu="rtx-4090", depth=4))
    other = recipe_of(snugpt.plan(gpu="rtx-4090", depth=4, checkpoint="blocks", state_dtype="bf16"))
    assert difference(recipe, recipe) == []
    assert difference(other, recipe) == ["checkpoint blocks", "state_dtype bf16"]

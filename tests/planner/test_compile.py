"""The lever `compile` in a plan: pinned, refused by its reason, left out where not derived."""

from __future__ import annotations

import pytest

import snugpt
from snugpt.errors import BadQuestionError
from snugpt.spec.recipe import TrainingRecipe


def recipe_of(**asked) -> TrainingRecipe:
    recipe = snugpt.plan(gpu="rtx-4090", **asked).recipe
    assert isinstance(recipe, TrainingRecipe)
    return recipe


def test_layers_are_compiled_where_it_is_asked_and_the_command_says_so():
    assert recipe_of(depth=4).compile == "off"
    plan = snugpt.plan(gpu="rtx-4090", depth=4, compile="on")
    assert isinstance(plan.recipe, TrainingRecipe)
    assert plan.recipe.compile == "on"
    assert "--compile on" in plan.command
    assert any("compiled layers" in note for note in plan.notes)


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_compiled_layers_are_predicted_to_keep_less(style):
    asked = {"gpu": "h100", "style": style, "depth": 12, "device_batch_size": 16}
    eager, compiled = (snugpt.plan(compile=each, **asked) for each in ("off", "on"))
    assert compiled.memory.allocated_bytes < 0.9 * eager.memory.allocated_bytes


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"gpu": "cpu"}, "it is for CUDA"),
        ({"gpu": "t4"}, "CUDA 8.0"),
        ({"gpu": "rtx-4090", "compute_dtype": "fp32"}, "bf16"),
        ({"gpu": "rtx-4090", "style": "gpt2", "dropout": 0.1}, "dropout"),
    ],
)
def test_where_it_can_t_be_it_is_refused_with_the_reason_and_the_way_out(asked, reason):
    with pytest.raises(BadQuestionError, match=reason) as refused:
        snugpt.plan(depth=4, compile="on", **asked)
    assert refused.value.hint.endswith("--compile off")


def test_a_batch_for_which_the_plan_is_another_is_left_out():
    """As many tokens as channels, with weighted norms: see `why_not_compiled`."""
    square = {
        "style": "llama",
        "width": 512,
        "layers": 2,
        "seq_len": 512,
        "total_batch_tokens": 512,
    }
    assert recipe_of(**square).device_batch_size == 1
    with pytest.raises(BadQuestionError, match="512"):
        recipe_of(compile="on", **square)
    larger = square | {"total_batch_tokens": 1024}
    assert recipe_of(compile="on", objective="memory", **larger).device_batch_size == 2

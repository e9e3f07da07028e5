"""How many tokens a run and a step take, against nanochat's own figures."""

from __future__ import annotations

import pytest

from snugpt.errors import BadQuestionError
from snugpt.planner.answer import plan
from snugpt.planner.horizon import CorpusSize, batch_tokens, target_tokens
from snugpt.planner.search import divisors
from snugpt.planner.subject import settled, shape_of
from snugpt.spec.plan import Plan
from snugpt.spec.question import Question
from snugpt.spec.recipe import TrainingRecipe

# nanochat, July 2026: 12 x (matrices + lm_head), the counts its models print
NANOCHAT_TOKENS = {12: 12 * 110_100_912, 20: 12 * 435_160_240, 24: 12 * 729_810_624}
MEGABYTE = CorpusSize(num_bytes=1_000_000, num_characters=990_000)


def _recipe(made: Plan) -> TrainingRecipe:
    assert isinstance(made.recipe, TrainingRecipe)
    return made.recipe


@pytest.mark.parametrize("depth", NANOCHAT_TOKENS)
def test_nanochat_sees_twelve_tokens_per_scaling_parameter(depth: int) -> None:
    question = Question(depth=depth)
    amount = target_tokens(question, shape_of(question, depth, None))
    assert amount.tokens == NANOCHAT_TOKENS[depth]


@pytest.mark.parametrize(
    ("depth", "exponent"), [(4, 18), (8, 18), (12, 19), (16, 19), (20, 20), (26, 20)]
)
def test_the_batch_of_the_dial_is_nanochats_power_of_two(depth: int, exponent: int) -> None:
    """2^round(19 + 0.383 log2(D / D_d12)), worked out by hand from the printed parameter counts."""
    question = Question(depth=depth)
    assert batch_tokens(question, shape_of(question, depth, None)).tokens == 2**exponent


@pytest.mark.parametrize("preset", ["tiny", "150M", "200M_1024"])
def test_a_presets_batch_is_its_sequences_times_its_context(preset: str) -> None:
    question = settled(Question(preset=preset))
    assert question.batch_size is not None
    assert question.seq_len is not None
    shape = shape_of(question, question.layers or 1, None)
    assert batch_tokens(question, shape).tokens == question.batch_size * question.seq_len


def test_a_short_text_shrinks_the_batch_so_that_200_steps_are_left() -> None:
    made = plan(gpu="t4", depth=4, seq_len=256, input="a.txt", corpus=MEGABYTE)
    tokens = 1_000_000 / 3.2
    assert _recipe(made).total_batch_tokens == 1024  # the power of two below tokens / 200
    assert tokens / _recipe(made).total_batch_tokens >= 200
    assert made.data is not None
    assert made.data.epochs == pytest.approx(made.speed.total_tokens / tokens, rel=1e-4)


def test_a_batch_that_was_said_is_not_shrunk() -> None:
    fields = {"gpu": "t4", "depth": 4, "seq_len": 256, "input": "a.txt", "corpus": MEGABYTE}
    assert _recipe(plan(**fields, batch_size=64)).total_batch_tokens == 64 * 256
    assert _recipe(plan(**fields, total_batch_tokens=2**16)).total_batch_tokens == 2**16


def test_a_pinned_total_that_does_not_divide_names_both_nearest_and_both_work() -> None:
    with pytest.raises(BadQuestionError, match="499712 and 501760") as caught:
        plan(gpu="t4", depth=4, total_batch_tokens=500_000)
    assert caught.value.hint == "snugpt plan --gpu t4 --depth 4 --total-batch-tokens 499712"
    for nearest in (499_712, 501_760):
        made = plan(gpu="t4", depth=4, total_batch_tokens=nearest)
        assert _recipe(made).total_batch_tokens == nearest


def test_a_pinned_device_batch_must_divide_too() -> None:
    fields = {"gpu": "a100-80gb", "depth": 4, "seq_len": 1024, "device_batch_size": 3}
    with pytest.raises(BadQuestionError, match="device_batch_size 3"):
        plan(**fields, total_batch_tokens=2**19)
    assert _recipe(plan(**fields)).total_batch_tokens % (3 * 1024) == 0


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"total_tokens": 123_456_789}, 123_456_789),
        ({"num_iterations": 77}, 77 * 2**19),
        ({"tokens_per_param": 2.0}, 2 * 110_100_912),
    ],
)
def test_a_pinned_horizon_is_taken(fields: dict[str, float], tokens: int) -> None:
    assert plan(gpu="rtx-4090", depth=12, **fields).speed.total_tokens == tokens


def test_hours_are_what_the_speed_gives() -> None:
    made = plan(gpu="rtx-4090", depth=12, hours=2.0)
    assert made.speed.hours == pytest.approx(2.0, rel=0.01)
    assert made.speed.hours <= 2.0
    assert "2 h" in made.reasons["total_tokens"]


def test_few_hours_still_leave_200_steps() -> None:
    made = plan(gpu="t4", depth=4, hours=0.05)
    assert _recipe(made).num_steps >= 190


def test_two_horizons_contradict() -> None:
    with pytest.raises(BadQuestionError, match="hours"):
        plan(gpu="t4", depth=4, hours=1.0, total_tokens=5)


def test_divisors_are_all_of_them_largest_first() -> None:
    assert divisors(36) == [36, 18, 12, 9, 6, 4, 3, 2, 1]
    assert divisors(1) == [1]


@pytest.mark.parametrize("hours", [12.0, 48.0])
def test_without_a_depth_the_deepest_that_learns_enough_in_time_is_chosen(hours: float) -> None:
    made = plan(gpu="rtx-4090", hours=hours)
    deeper = plan(gpu="rtx-4090", depth=made.shape.num_layers + 2, hours=hours)
    target = 12 * (deeper.parameters.groups["matrices"] + deeper.parameters.groups["head"])
    assert made.fits
    assert not deeper.fits or deeper.speed.total_tokens < target


def test_a_short_text_gets_a_shallow_model() -> None:
    made = plan(gpu="rtx-4090", input="a.txt", corpus=MEGABYTE)
    assert made.shape.num_layers <= 4
    assert "depth" in made.reasons

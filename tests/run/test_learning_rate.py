"""The schedule of the learning rate: a trapezoid, and nothing but a function of the step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_plan import tiny_schedule

from snugpt.run.learning_rate import rate_factor, set_rates
from snugpt.spec.recipe import Schedule

careful = settings(deadline=None, derandomize=True)
fractions = st.floats(0.0, 1.0)


@st.composite
def schedules(draw) -> tuple[Schedule, int]:
    schedule = tiny_schedule(
        warmup_fraction=draw(fractions),
        cooldown_fraction=draw(fractions),
        final_fraction=draw(fractions),
    )
    return schedule, draw(st.integers(1, 300))


def ends(schedule: Schedule, num_steps: int) -> tuple[int, int]:
    """The step that warm-up ends before, and the one that cool-down begins with."""
    warmup = round(schedule.warmup_fraction * num_steps)
    return warmup, max(warmup, num_steps - round(schedule.cooldown_fraction * num_steps))


@careful
@given(schedules())
def test_it_stays_between_nothing_and_the_base_rate(asked) -> None:
    schedule, num_steps = asked
    factors = [rate_factor(schedule, step, num_steps) for step in range(num_steps)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert factors[0] > 0.0 or schedule.final_fraction == 0.0
    assert factors == [rate_factor(schedule, step, num_steps) for step in range(num_steps)]


@careful
@given(schedules())
def test_it_rises_stays_and_falls(asked) -> None:
    schedule, num_steps = asked
    factors = [rate_factor(schedule, step, num_steps) for step in range(num_steps)]
    top, fall = ends(schedule, num_steps)
    assert all(a < b for a, b in pairwise(factors[:top]))
    assert factors[top:fall] == [1.0] * (fall - top)
    assert all(a >= b for a, b in pairwise(factors[fall:]))


@careful
@given(schedules())
def test_it_takes_no_leap_larger_than_one_step_of_its_slopes(asked) -> None:
    schedule, num_steps = asked
    warmup = round(schedule.warmup_fraction * num_steps)
    cooldown = round(schedule.cooldown_fraction * num_steps)
    assume(warmup + cooldown <= num_steps)
    factors = [rate_factor(schedule, step, num_steps) for step in range(num_steps + 1)]
    highest = max(1 / (warmup + 1), (1 - schedule.final_fraction) / (cooldown + 1)) + 1e-12
    assert all(abs(a - b) <= highest for a, b in pairwise(factors))


@careful
@given(schedules())
def test_it_ends_one_step_above_the_final_fraction(asked) -> None:
    schedule, num_steps = asked
    assume(round(schedule.warmup_fraction * num_steps) < num_steps)
    cooldown = round(schedule.cooldown_fraction * num_steps)
    last, final = rate_factor(schedule, num_steps - 1, num_steps), schedule.final_fraction
    assert last == pytest.approx(final + (1 - final) / (cooldown + 1) if cooldown else 1.0)
    assert rate_factor(schedule, num_steps, num_steps) == pytest.approx(final)


def test_a_trapezoid_by_hand() -> None:
    schedule = tiny_schedule(warmup_fraction=0.2, cooldown_fraction=0.4, final_fraction=0.1)
    wanted = [1 / 3, 2 / 3, 1, 1, 1, 1, 0.1 + 0.9 * 4 / 5, 0.64, 0.46, 0.28]
    assert [rate_factor(schedule, step, 10) for step in range(10)] == pytest.approx(wanted)


def test_every_group_keeps_its_own_base_rate() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [
        {"params": [w], "lr": lr, "base_lr": lr} for w, lr in zip(weights, (0.1, 2.0), strict=True)
    ]
    optimizer = torch.optim.SGD(groups)
    for factor in (0.5, 0.25, 1.0):
        set_rates([optimizer], factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1 * factor, 2.0 * factor]

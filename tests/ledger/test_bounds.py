"""The bound of Clopper and Pearson against its definition and published values."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest

from snugpt.ledger.bounds import upper_bound


@pytest.mark.parametrize("trials", [1, 2, 8, 59, 300])
def test_without_errors_it_is_what_can_be_solved_by_hand(trials: int) -> None:
    assert upper_bound(0, trials) == pytest.approx(1 - 0.05 ** (1 / trials), abs=1e-9)


# Upper ends of two-sided 90 % intervals, which are one-sided 95 % bounds.
@pytest.mark.parametrize(("errors", "trials", "bound"), [(1, 10, 0.3942), (2, 20, 0.2826)])
def test_it_agrees_with_tables(errors: int, trials: int, bound: float) -> None:
    assert upper_bound(errors, trials) == pytest.approx(bound, abs=5e-5)


@pytest.mark.parametrize(("errors", "trials"), [(1, 3), (5, 12), (11, 12)])
def test_at_the_bound_so_few_errors_have_a_chance_of_five_percent(errors: int, trials: int) -> None:
    rate = Fraction(upper_bound(errors, trials))
    chance = sum(comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(errors + 1))
    assert float(chance) == pytest.approx(0.05, abs=1e-9)


def test_nothing_is_known_without_trials_and_all_wrong_bounds_nothing() -> None:
    assert upper_bound(0, 0) is None
    assert upper_bound(4, 4) == 1.0

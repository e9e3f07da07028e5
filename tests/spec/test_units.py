"""Figures for people: two that differ never read alike where one is set against the other."""

from __future__ import annotations

import pytest

from snugpt.units import GIB, gib_of


@pytest.mark.parametrize(
    ("need", "have", "said"),
    [
        (24.1 * GIB, 23.5 * GIB, "24.1 GiB of 23.5 GiB"),
        (23.54 * GIB, 23.5 * GIB, "23.54 GiB of 23.50 GiB"),
        (23.504 * GIB, 23.5 * GIB, "23.504 GiB of 23.500 GiB"),
        (23.5 * GIB, 23.5 * GIB, "23.5 GiB of 23.5 GiB"),
        (5.341 * GIB, 5.339 * GIB, "5.341 GiB of 5.339 GiB"),
        (141.3 * GIB, 141.2 * GIB, "141.30 GiB of 141.20 GiB"),
    ],
)
def test_a_need_and_a_capacity_read_differently_unless_they_are_the_same(
    need: float, have: float, said: str
) -> None:
    assert gib_of(round(need), round(have)) == said

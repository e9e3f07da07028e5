"""Each epoch is a permutation, and a different one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snugpt.data.row_order import RowOrder

PINNED = [
    0,
    9,
    6,
    4,
    5,
    3,
    2,
    7,
    8,
    1,
    6,
    9,
]  # epoch 0 of 10 rows with seed 42, and two rows of epoch 1


def _epoch(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return RowOrder(num_rows=num_rows, seed=seed).rows(epoch * num_rows, num_rows)


@pytest.mark.parametrize("num_rows", [*range(1, 130), 255, 256, 257, 1000, 4096, 10_007])
def test_every_epoch_has_every_row_once(num_rows: int) -> None:
    for epoch in (0, 1, 1000):
        rows = _epoch(num_rows, seed=7, epoch=epoch)
        assert np.array_equal(np.sort(rows), np.arange(num_rows))


@given(st.integers(1, 5000), st.integers(-(2**70), 2**70), st.integers(0, 10**9))
def test_every_epoch_has_every_row_once_for_any_seed(num_rows: int, seed: int, epoch: int) -> None:
    rows = _epoch(num_rows, seed, epoch)
    assert np.array_equal(np.sort(rows), np.arange(num_rows))


@given(st.integers(1, 100), st.integers(0, 300), st.integers(0, 100), st.integers(0, 100))
def test_rows_do_not_depend_on_how_they_are_asked_for(
    num_rows: int, first: int, count: int, cut: int
) -> None:
    order = RowOrder(num_rows=num_rows, seed=3)
    cut = min(cut, count)
    parts = [order.rows(first, cut), order.rows(first + cut, count - cut)]
    assert np.array_equal(np.concatenate(parts), order.rows(first, count))


def test_epochs_and_seeds_differ() -> None:
    orders = [_epoch(1000, seed, epoch) for seed in range(5) for epoch in range(5)]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            # Two random permutations agree in one place on average.
            assert (one == other).sum() < 10


def test_order_of_a_few_rows_is_fair() -> None:
    """All 24 orders of 4 rows occur, each about as often (chi-square, 23 degrees of freedom)."""
    num_epochs = 4800
    rows = RowOrder(num_rows=4, seed=0).rows(0, 4 * num_epochs).reshape(num_epochs, 4)
    counts = np.array(list(Counter(map(tuple, rows.tolist())).values()))
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 60


def test_neighbours_in_the_text_are_not_neighbours_in_the_order() -> None:
    rows = _epoch(100_000, seed=1, epoch=0)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    assert (np.abs(np.diff(rows)) == 1).sum() < 20


def test_order_is_the_one_that_old_runs_resume_with() -> None:
    """Changing the order breaks resuming of every stored run: let it be on purpose."""
    assert RowOrder(num_rows=10, seed=42).rows(0, 12).tolist() == PINNED

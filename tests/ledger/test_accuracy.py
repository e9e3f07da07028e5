"""Predicted ÷ measured, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from snugpt.ledger.accuracy import AccuracyRow, accuracy
from snugpt.spec.measurement import Measurement
from snugpt.spec.memory import MemoryEstimate


def test_rows_are_grouped_by_program_and_counter(
    make_measurement: Callable[..., Measurement], make_estimate: Callable[..., MemoryEstimate]
) -> None:
    predicted = make_estimate(100, reserved=120, process=300)
    runs = [
        make_measurement(predicted=predicted, allocated_bytes=80, process_bytes=400),  # 1.25, .75
        make_measurement(predicted=predicted, allocated_bytes=100, reserved_bytes=160),  # 1, .75
        make_measurement(predicted=predicted, allocated_bytes=200),  # 0.5
        make_measurement(predicted=predicted, allocated_bytes=400),  # 0.25
        make_measurement(program="nanochat@2026-07", predicted=predicted, allocated_bytes=50),  # 2
    ]
    rows = accuracy(runs)
    assert rows == (
        _row("nanochat@2026-07", "allocated", 1, 2.0, 2.0, 2.0, 0),
        _row("snugpt train", "allocated", 4, 0.25, 0.75, 1.25, 2),
        _row("snugpt train", "process", 1, 0.75, 0.75, 0.75, 1),
        _row("snugpt train", "reserved", 1, 0.75, 0.75, 0.75, 1),
    )


@pytest.mark.parametrize("outcome", ["oom", "failed"])
def test_a_run_that_did_not_end_has_no_ratio(
    outcome: str,
    make_measurement: Callable[..., Measurement],
    make_estimate: Callable[..., MemoryEstimate],
) -> None:
    stopped = make_measurement(outcome=outcome, predicted=make_estimate(100), allocated_bytes=50)
    assert accuracy([stopped, make_measurement(allocated_bytes=50)]) == ()


def _row(
    program: str, counter: str, n: int, low: float, middle: float, high: float, below: int
) -> AccuracyRow:
    return AccuracyRow(
        program=program,
        counter=counter,  # type: ignore[arg-type]
        n=n,
        lowest=low,
        middle=middle,
        highest=high,
        num_below_1=below,
    )

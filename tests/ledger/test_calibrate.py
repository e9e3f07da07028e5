"""Fitted terms read off measurements; everything else is left alone."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from snugpt.errors import FailedError
from snugpt.ledger.calibrate import calibrate
from snugpt.spec.calibration import Calibration
from snugpt.spec.measurement import Measurement
from snugpt.spec.memory import MemoryEstimate

Make = Callable[..., Measurement]
Estimate = Callable[..., MemoryEstimate]


def test_the_factor_is_the_median_of_what_the_other_terms_leave(
    make_measurement: Make, make_estimate: Estimate
) -> None:
    predicted = make_estimate(1000, fitted={"context": 100})  # 900 exact, 100 fitted
    runs = [
        make_measurement(id=name, predicted=predicted, allocated_bytes=900 + taken)
        for name, taken in (("a", 110), ("b", 150), ("c", 400))
    ]
    calibration = calibrate(runs)
    factor = calibration.factors["context"]
    assert (factor.value, factor.low, factor.high) == (1.5, 1.1, 4.0)
    assert (factor.n, factor.sources) == (3, ("a", "b", "c"))
    exact, fitted = predicted.terms
    assert calibration.corrected(fitted).bytes == 150
    assert calibration.corrected(exact) is exact
    assert Calibration().corrected(fitted) is fitted
    derived = msgspec.structs.replace(fitted, basis="derived")
    assert calibration.corrected(derived) is derived


def test_two_measurements_are_too_few_also_when_one_is_there_twice(
    make_measurement: Make, make_estimate: Estimate
) -> None:
    predicted = make_estimate(1000, fitted={"context": 100})
    runs = [make_measurement(id=name, predicted=predicted, allocated_bytes=950) for name in "aab"]
    with pytest.raises(FailedError, match=r"2 measurements .* 3 are needed"):
        calibrate(runs)


def test_what_can_not_be_told_apart_is_no_evidence(
    make_measurement: Make, make_estimate: Estimate
) -> None:
    """Two fitted terms share one figure; nothing fitted; derived terms above the measurement."""
    for allocated, fitted in (
        (1000, {"context": 100, "slack": 50}),
        (1000, {}),
        (800, {"context": 100}),
    ):
        predicted = make_estimate(1000, fitted=fitted)
        runs = [
            make_measurement(id=name, predicted=predicted, allocated_bytes=allocated)
            for name in "abc"
        ]
        with pytest.raises(FailedError, match="0 measurements"):
            calibrate(runs)

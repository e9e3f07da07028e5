"""Measurements to Calibration: what the fitted terms of past predictions should have been.

A peak has one measured figure, so a fitted term can be read off only where it is the only one of
its prediction: what was allocated, minus the exact, derived and assumed terms, is what it took.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from snugpt.errors import FailedError
from snugpt.spec.calibration import MIN_EVIDENCE, Calibration, Factor
from snugpt.spec.measurement import Measurement


def calibrate(measurements: Iterable[Measurement]) -> Calibration:
    """Return the median factor of every fitted term with at least 3 measurements behind it.

    Raises:
        FailedError: no fitted term has that many.
    """
    evidence: dict[str, dict[str, float]] = defaultdict(dict)
    for measurement in measurements:
        for name, factor in _readings(measurement):
            evidence[name][measurement.id] = factor  # a line copied twice counts once
    enough = {name: found for name, found in evidence.items() if len(found) >= MIN_EVIDENCE}
    if not enough:
        most = max((len(found) for found in evidence.values()), default=0)
        raise FailedError(
            f"too little evidence to calibrate: {most} measurements of a fitted term,"
            f" {MIN_EVIDENCE} are needed",
            hint="snugpt probe",
        )
    return Calibration(factors={name: _factor(found) for name, found in sorted(enough.items())})


def _readings(measurement: Measurement) -> Iterable[tuple[str, float]]:
    """The factor of the prediction's one fitted term, if the rest leaves it any bytes."""
    predicted, measured = measurement.predicted, measurement.allocated_bytes
    if measurement.outcome != "fit" or predicted is None or measured is None:
        return
    fitted = [term for term in predicted.terms if term.basis == "fitted" and term.bytes > 0]
    if len(fitted) != 1:
        return
    taken = measured - (predicted.allocated_bytes - fitted[0].bytes)
    # Nothing left means that the derived terms are too large: a bug, which no factor may hide.
    if taken > 0:
        yield fitted[0].name, taken / fitted[0].bytes


def _factor(found: dict[str, float]) -> Factor:
    factors = found.values()
    return Factor(
        value=median(factors), low=min(factors), high=max(factors), sources=tuple(sorted(found))
    )

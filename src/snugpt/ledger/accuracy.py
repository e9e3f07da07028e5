"""How good the predictions were: predicted ÷ measured over the ledger."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

import msgspec

from snugpt.spec.measurement import Counter, Measurement

RATIO_DIGITS = 4  # behind the point, as every table shows a ratio


class AccuracyRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Predicted ÷ measured of one program by one counter; above 1 is on the safe side."""

    program: str
    counter: Counter
    n: int
    lowest: float
    middle: float  # the median
    highest: float
    num_below_1: int  # runs that took more than was predicted, in the digits of a ratio


def accuracy(measurements: Iterable[Measurement]) -> tuple[AccuracyRow, ...]:
    """Return one row per program and counter, in that order of names.

    Only runs that fitted and had a prediction count: one that went out of memory was stopped
    before its peak.
    """
    ratios: dict[tuple[str, Counter], list[float]] = defaultdict(list)
    for measurement in measurements:
        for counter, ratio in measurement.ratios.items():
            ratios[measurement.program, counter].append(ratio)
    return tuple(accuracy_row(*key, ratios[key]) for key in sorted(ratios))


def accuracy_row(program: str, counter: Counter, ratios: list[float]) -> AccuracyRow:
    """Return what at least one ratio of a program by a counter comes to."""
    return AccuracyRow(
        program=program,
        counter=counter,
        n=len(ratios),
        lowest=min(ratios),
        middle=median(ratios),
        highest=max(ratios),
        num_below_1=sum(round(ratio, RATIO_DIGITS) < 1.0 for ratio in ratios),
    )

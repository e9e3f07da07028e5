"""Records of what levers cost in time, and the factors they make.

A record is one lever on one size of model: pairs of steps, one plain and one with the lever, in
turn in one process (`bench/lever_costs.py`). Its ratio over what was counted is one reading of the
factor; three readings make one (`spec/calibration.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from snugpt.errors import bad_line, bad_value
from snugpt.estimate.lever_times import TIMED
from snugpt.ledger.own_records import content_of
from snugpt.spec.calibration import MIN_EVIDENCE, Factor
from snugpt.spec.gpu import Backend
from snugpt.spec.measurement import Environment


class LeverCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One lever on one model: step time over plain step time.

    `low`, `ratio` and `high` are the quartiles over `pairs`; `noise_low` and `noise_high` those of
    two plain steps, measured in the same way. `counted` is the ratio that the estimate counts.
    """

    schema: int = 1
    id: str
    time: str
    backend: Backend
    lever: str
    sizes: dict[str, Any]
    pairs: int
    low: float
    ratio: float
    high: float
    noise_low: float
    noise_high: float
    counted: float
    environment: Environment

    def __post_init__(self) -> None:
        if not 0.0 < self.low <= self.ratio <= self.high:
            raise bad_value("ratio", self.ratio, f"above 0, within {self.low} to {self.high}")
        if not self.counted > 0.0:
            raise bad_value("counted", self.counted, "above 0")


def read(path: Path) -> list[LeverCost]:
    """Return the records of a file, none if it is not there.

    Raises:
        FailedError: a line is not a record.
    """
    found = []
    lines = content_of(path).splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(msgspec.json.decode(line, type=LeverCost))
        except (msgspec.MsgspecError, ValueError) as error:
            raise bad_line(str(path), number, error) from error
    return found


def factors(records: Iterable[LeverCost]) -> dict[str, dict[str, Factor]]:
    """Return measured over counted, by backend and lever, where enough records have it."""
    readings: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for record in records:
        if record.lever.split()[0] not in TIMED:
            continue  # a batch cut in half, say: no lever, but good to have beside them
        readings[record.backend, record.lever][record.id] = record.ratio / record.counted
    found: dict[str, dict[str, Factor]] = {}
    for (backend, lever), by_id in sorted(readings.items()):
        if len(by_id) >= MIN_EVIDENCE:
            low, value, high = min(by_id.values()), median(by_id.values()), max(by_id.values())
            factor = Factor(value=value, low=low, high=high, sources=tuple(sorted(by_id)))
            found.setdefault(backend, {})[lever] = factor
    return found

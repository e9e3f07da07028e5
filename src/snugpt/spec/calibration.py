"""Calibration: what past measurements say about the terms of an estimate that were only fitted.

Exact and derived terms are never scaled: one that disagrees with a measurement is a bug to mend.
"""

from __future__ import annotations

import math

import msgspec

from snugpt.errors import bad_value
from snugpt.spec.memory import MemoryTerm

MIN_EVIDENCE = 3  # measurements; a factor from fewer would repeat an accident


class Factor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a term is multiplied by: the middle of `n` measurements between `low` and `high`."""

    value: float
    low: float
    high: float
    sources: tuple[str, ...]  # ids of the measurements

    def __post_init__(self) -> None:
        if not (math.isfinite(self.high) and 0.0 < self.low <= self.value <= self.high):
            raise bad_value("value", self.value, f"above 0, within {self.low} to {self.high}")
        if len(set(self.sources)) < MIN_EVIDENCE:
            raise bad_value("sources", self.sources, f"at least {MIN_EVIDENCE} measurements")

    @property
    def n(self) -> int:
        """How many measurements stand behind it."""
        return len(self.sources)


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Correction factors by the name of a fitted term; empty until there is evidence."""

    factors: dict[str, Factor] = {}

    def corrected(self, term: MemoryTerm) -> MemoryTerm:
        """Return `term` scaled by its factor; a term that is not fitted comes back as it is."""
        factor = self.factors.get(term.name)
        if factor is None or term.basis != "fitted":
            return term
        return msgspec.structs.replace(
            term,
            bytes=round(term.bytes * factor.value),
            formula=f"{term.formula} × {factor.value:.3g} (n = {factor.n})",
        )

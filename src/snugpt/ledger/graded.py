"""Graded: one record beside its prediction, whoever measured it."""

from __future__ import annotations

import msgspec

from snugpt.spec.measurement import Counter


class Graded(msgspec.Struct, frozen=True, kw_only=True):
    """One record beside what is predicted of it; None where either side has no figure."""

    id: str
    program: str
    evidence: str
    source: str
    gpu: str
    setup: str  # shape, batch, cards: rows that share it are one trial of a verdict
    counter: Counter
    predicted_bytes: int | None = None
    measured_bytes: int | None = None
    said_fits: bool | None = None
    did_fit: bool | None = None

    @property
    def ratio(self) -> float | None:
        """Predicted ÷ measured."""
        if self.predicted_bytes is None or not self.measured_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes

"""MemoryEstimate: one predicted peak, its terms and its counters.

It lies here and not in estimate/, because a Measurement keeps the prediction it was made against.
"""

from __future__ import annotations

from typing import Literal

import msgspec

# "recorded" and "unknown" stand in what a memory snapshot does not say; no prediction has them.
Phase = Literal[
    "forward", "loss", "backward", "clip", "optimizer", "evaluate", "prefill", "decode", "recorded"
]  # fmt: skip
Category = Literal[
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "kv_cache",
    "communication",
    "workspace",
    "batch",
    "slack",
    "unknown",
]
Basis = Literal["exact", "derived", "fitted", "assumed"]


class Band(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure that is not certain: lowest, expected and highest, in one unit."""

    low: float
    expected: float
    high: float


class BytesBand(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes that are not certain: lowest, expected and highest."""

    low: int
    expected: int
    high: int


class MemoryTerm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One named share of a peak, in bytes, with its formula in words and what it rests on."""

    name: str
    category: Category
    bytes: int
    formula: str
    basis: Basis


class MemoryEstimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The peak of one step by every counter. All figures in bytes.

    `terms` are what is alive at the peak; they sum to `allocated_bytes`.
    """

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: BytesBand
    process_bytes: BytesBand
    capacity_bytes: int
    headroom_bytes: int
    peak_phase: Phase
    phases: dict[str, int]  # requested peak within each phase
    terms: tuple[MemoryTerm, ...]

    @property
    def categories(self) -> dict[Category, int]:
        """Bytes at the peak by category, the largest first."""
        sizes: dict[Category, int] = {}
        for term in self.terms:
            sizes[term.category] = sizes.get(term.category, 0) + term.bytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    @property
    def fits(self) -> bool:
        """Whether the most pessimistic process size is within the device."""
        return self.process_bytes.high <= self.capacity_bytes

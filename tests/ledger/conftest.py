"""Shared by the tests of ledger/: one measurement, with any field replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from snugpt.spec.measurement import Environment, Measurement
from snugpt.spec.memory import Basis, BytesBand, MemoryEstimate, MemoryTerm


@pytest.fixture
def make_measurement() -> Callable[..., Measurement]:
    """Return a function that makes a measurement that fitted."""

    def make(**fields: Any) -> Measurement:
        known: dict[str, Any] = {
            "id": "20261120T110827Z-00000001",
            "time": "2026-11-20T11:08:27Z",
            "program": "snugpt train",
            "outcome": "fit",
            "gpu_id": None,
            "gpu_name": "a processor",
            "environment": Environment(
                python="3.11", platform="Linux", device="a processor", snugpt="0.1.0"
            ),
        }
        return Measurement(**(known | fields))

    return make


@pytest.fixture
def make_estimate() -> Callable[..., MemoryEstimate]:
    """Return a function that makes a prediction of so many bytes, `fitted` of them fitted."""

    def make(
        allocated: int, reserved: int = 0, process: int = 0, fitted: dict[str, int] | None = None
    ) -> MemoryEstimate:
        fitted = fitted or {}
        rest = allocated - sum(fitted.values())
        return MemoryEstimate(
            requested_bytes=rest,
            allocated_bytes=allocated,
            reserved_bytes=BytesBand(reserved, reserved, 2 * reserved),
            process_bytes=BytesBand(process, process, 2 * process),
            capacity_bytes=10**6,
            headroom_bytes=0,
            peak_phase="backward",
            phases={"backward": rest},
            terms=(
                _term("weights", rest, "exact"),
                *(_term(name, size, "fitted") for name, size in fitted.items()),
            ),
        )

    return make


def _term(name: str, size_bytes: int, basis: Basis) -> MemoryTerm:
    category = "weights" if basis == "exact" else "workspace"
    return MemoryTerm(name=name, category=category, bytes=size_bytes, formula="n", basis=basis)

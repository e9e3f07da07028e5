"""What a run tells while it goes on, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snugpt.run.run_folder import RunFolder
from snugpt.spec.measurement import Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One logged step. `mfu` is None where the device's rate is not known."""

    step: int
    num_steps: int
    loss: float
    tokens_per_s: float
    mfu: float | None
    seconds_left: float
    allocated_bytes: int | None
    reserved_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """Bits per byte on the validation text after `step` steps."""

    step: int
    bits_per_byte: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A line for the person who watches."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """How a run ended. `measurement` is None if it was interrupted before it was measured."""

    folder: RunFolder
    steps: int
    finished: bool
    interrupted_by: str | None
    bits_per_byte: float | None
    measurement: Measurement | None


Report = StepReport | EvaluationReport | Notice
Watcher = Callable[[Report], None]

"""Measurement: what a run really took, with the prediction it was made against.

Out of memory is data too: its peaks bound the need from below and never enter a ratio.
"""

from __future__ import annotations

import math
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, cast, get_args

import msgspec
from msgspec import inspect

from snugpt.errors import BadQuestionError, FailedError, bad_value
from snugpt.spec.memory import MemoryEstimate, Phase
from snugpt.spec.recipe import Recipe
from snugpt.spec.shape import ModelShape

Outcome = Literal["fit", "oom", "failed"]
Counter = Literal["allocated", "reserved", "process"]
COUNTERS: tuple[Counter, ...] = get_args(Counter)
SCHEMA = 1


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """What ran it: versions, device, allocator setting. None where it does not apply."""

    python: str
    platform: str
    device: str  # as its driver names it; the processor's name on the CPU
    snugpt: str
    torch: str | None = None
    driver: str | None = None
    cuda: str | None = None
    cudnn: str | None = None
    allocator: str | None = None  # PYTORCH_ALLOC_CONF
    num_threads: int | None = None
    git_commit: str | None = None


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One run's peaks in bytes, as counted, beside the prediction as it was that day.

    `counters` says for "allocated", "reserved" and "process" what counted it. `phases` are peaks of
    the allocated bytes within each phase. `retries`: how often a step ran out of memory and was
    taken again with a smaller micro-batch; the rest is then of the recipe in effect at the end.
    `final_loss` is in nats per token.
    """

    schema: int = SCHEMA
    id: str
    time: str  # UTC, ISO 8601
    program: str
    outcome: Outcome
    gpu_id: str | None  # of the catalogue; None for a card that is not in it
    gpu_name: str
    shape: ModelShape | None = None
    recipe: Recipe | None = None
    predicted: MemoryEstimate | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None
    counters: dict[str, str] = {}
    phases: dict[Phase, int] | None = None
    alloc_retries: int | None = None
    num_ooms: int | None = None
    tokens_per_s: float | None = None
    steps: int | None = None
    retries: int | None = None
    final_loss: float | None = None
    bits_per_byte: float | None = None
    environment: Environment
    argv: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_time(self.time)
        for field in ("id", "program"):
            if not getattr(self, field):
                raise bad_value(field, getattr(self, field), "a text that is not empty")
        for field in _COUNTS:
            value = getattr(self, field)
            if value is not None and value < 0:
                raise bad_value(field, value, "0 or more")
        for field in ("tokens_per_s", "final_loss", "bits_per_byte"):
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise bad_value(field, value, "a finite number from 0, or absent")

    def measured_bytes(self, counter: Counter) -> int | None:
        """Return the measured peak of `counter` in bytes, None where nothing counted it."""
        return cast("int | None", getattr(self, f"{counter}_bytes"))

    def predicted_bytes(self, counter: Counter) -> int | None:
        """Return the expected peak of `counter` in bytes, None without a prediction."""
        if self.predicted is None:
            return None
        if counter == "allocated":
            return self.predicted.allocated_bytes
        band = self.predicted.reserved_bytes
        return (self.predicted.process_bytes if counter == "process" else band).expected

    def ratio(self, counter: Counter) -> float | None:
        """Return predicted ÷ measured (above 1 is on the safe side), None where one is missing.

        Only a run that fitted has a ratio: one that did not reach its end did not reach its peak.
        """
        predicted, measured = self.predicted_bytes(counter), self.measured_bytes(counter)
        if self.outcome != "fit" or predicted is None or not measured:
            return None
        return predicted / measured

    @property
    def ratios(self) -> dict[Counter, float]:
        """Predicted ÷ measured of every counter that has both."""
        known = {counter: self.ratio(counter) for counter in COUNTERS}
        return {counter: ratio for counter, ratio in known.items() if ratio is not None}


_COUNTS = (
    "allocated_bytes",
    "reserved_bytes",
    "process_bytes",
    "alloc_retries",
    "num_ooms",
    "steps",
    "retries",
)


def utc_now() -> str:
    """Return the present in UTC to the second, ISO 8601: 2026-11-20T11:08:27Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_id(time: str) -> str:
    """Return a name no other measurement has; ids sort by time."""
    return f"{time.translate({ord(c): None for c in '-:'})}-{secrets.token_hex(4)}"


def measurement_from_json(text: bytes | str) -> Measurement:
    """Read one measurement; keys that this version does not know are left out.

    Raises:
        FailedError: the text is not JSON, or a value is not what its field may hold.
    """
    try:
        value = msgspec.json.decode(text)
        return msgspec.convert(_known(value, inspect.type_info(Measurement)), Measurement)
    except (msgspec.MsgspecError, UnicodeDecodeError, BadQuestionError) as error:
        raise FailedError(f"not a measurement: {error}", hint="snugpt records") from error


def _known(value: Any, kind: inspect.Type) -> Any:
    """Drop the keys that the structs within `kind` do not have, so that newer lines can be read."""
    if isinstance(kind, inspect.UnionType) and isinstance(value, dict):
        structs = [each for each in kind.types if isinstance(each, inspect.StructType)]
        tagged = [each for each in structs if value.get(each.tag_field or "") == each.tag]
        return _known(value, (tagged or structs)[0]) if structs else value
    if isinstance(kind, inspect.StructType) and isinstance(value, dict):
        fields = {field.encode_name: field.type for field in kind.fields}
        found = {key: _known(value[key], fields[key]) for key in value if key in fields}
        if kind.tag_field in value:
            found[str(kind.tag_field)] = value[str(kind.tag_field)]
        return found
    if isinstance(kind, inspect.VarTupleType) and isinstance(value, list):
        return [_known(item, kind.item_type) for item in value]
    return value


def _check_time(time: str) -> None:
    try:
        zone = datetime.fromisoformat(time).utcoffset()
    except ValueError:
        zone = None
    if zone != timedelta(0):
        raise bad_value("time", time, "a UTC time such as 2026-11-20T11:08:27Z")

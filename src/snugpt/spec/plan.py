"""Plan: one file, plan.json, the only thing a run needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from snugpt.errors import BadQuestionError, FailedError, bad_value
from snugpt.spec.gpu import Gpu
from snugpt.spec.memory import Band, Basis, MemoryEstimate
from snugpt.spec.question import Question
from snugpt.spec.recipe import GenerationRecipe, TrainingRecipe
from snugpt.spec.shape import ModelShape

SCHEMA = 1


class SpeedEstimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How fast, and how long the whole recipe takes."""

    tokens_per_s: Band
    step_s: float
    total_tokens: int
    hours: float
    basis: Basis
    source: str  # what the rate rests on, in words


class DataEstimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the horizon reads. `characters`, `shards` and `epochs` are None without a corpus."""

    tokens: int
    characters: int | None = None
    shards: int | None = None
    epochs: float | None = None


class HostEstimate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the run takes from the host, in bytes."""

    ram_bytes: int
    disk_bytes: int
    checkpoint_bytes: int


class Alternative(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another plan: what is different, and what it comes to."""

    change: str
    recipe: TrainingRecipe | GenerationRecipe
    memory: MemoryEstimate
    speed: SpeedEstimate
    command: str


class Rejection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A choice that was not taken, and why."""

    change: str
    because: str


class Rung(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One set of levers on the front of time against bytes; factors against the first rung."""

    levers: dict[str, str | int]
    bytes_saved: int
    time_factor: float
    exact: bool


class Parameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameter counts: the whole and by group."""

    total: int
    groups: dict[str, int]


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answer to a Question."""

    schema: int = SCHEMA
    fits: bool
    question: Question
    stack: str
    command: str
    gpu: Gpu
    shape: ModelShape
    parameters: Parameters
    recipe: TrainingRecipe | GenerationRecipe
    reasons: dict[str, str]  # for each field the planner chose: why
    memory: MemoryEstimate
    speed: SpeedEstimate
    data: DataEstimate | None
    host: HostEstimate
    cost: None = None  # prices come with their own issue; nothing is invented until then
    alternatives: tuple[Alternative, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    ladder: tuple[Rung, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        recipe, context = self.recipe, self.shape.context_len
        if isinstance(recipe, TrainingRecipe) and recipe.seq_len > context:
            raise bad_value("seq_len", recipe.seq_len, f"up to the model's context, {context}")


def encode_plan(plan: Plan) -> bytes:
    """Write a plan as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n"


def read_plan(path: Path) -> Plan:
    """Read a plan.json.

    Raises:
        BadQuestionError: it is not a plan, of another schema, or has a field out of range.
        FailedError: it can't be read.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FailedError(
            f"plan {str(path)!r} can't be read: {error.strerror}",
            hint="snugpt plan --depth 12 --json > plan.json",
        ) from None
    return decode_plan(raw, str(path))


def decode_plan(raw: bytes, name: str) -> Plan:
    """Turn the bytes of a plan.json into a Plan; `name` is for the error."""
    hint = "snugpt plan --depth 12 --json > plan.json"
    try:
        schema = msgspec.json.decode(raw, type=dict[str, Any]).get("schema")
        if schema != SCHEMA:
            raise bad_value("schema", schema, f"this snugpt reads {SCHEMA}")
        return msgspec.json.decode(raw, type=Plan)
    except BadQuestionError as error:
        raise BadQuestionError(f"{name}: {error.message}", hint=hint) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadQuestionError(f"{name} is not a plan: {error}", hint=hint) from None

"""Plan: one file, plan.json, the only thing a run needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from snugpt.errors import BadQuestionError, FailedError, bad_value
from snugpt.spec.gpu import Gpu
from snugpt.spec.memory import Band, Basis, MemoryEstimate
from snugpt.spec.question import Question
from snugpt.spec.recipe import GenerationRecipe, TrainingRecipe
from snugpt.spec.shape import ModelShape

SCHEMA = 1
_ENUM = re.compile(r"Invalid enum value '(.*)' - at `\$\.(.*)`", re.DOTALL)
# A plan's own command, for one GPU and for several, and no more than one.
_COMMAND = re.compile(
    r"(?:snugpt plan|torchrun --nproc-per-node \d -m snugpt\.cli train)"
    r"( [^\x00-\x1f;&|<>$`\\]*)?"
)
_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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
        name = str(path)
        free = isinstance(error, FileNotFoundError) and name.endswith(".json")
        free = free and _STEM.fullmatch(name) is not None  # and in the present folder
        raise FailedError(
            f"plan {name!r} can't be read: {error.strerror}",
            hint=f"snugpt plan --depth 12 -o {name if free else _beside(name)}",
        ) from None
    return decode_plan(raw, str(path))


def decode_plan(raw: bytes, name: str) -> Plan:
    """Turn the bytes of a plan.json into a Plan; `name` is for the error.

    The hint is the command that the plan was made with; it leaves the file alone.
    """
    fields: dict[str, Any] = {}
    try:
        fields = msgspec.json.decode(raw, type=dict[str, Any])
        schema = fields.get("schema")
        if schema != SCHEMA:
            raise bad_value("schema", schema, f"this snugpt reads {SCHEMA}")
        return msgspec.json.decode(raw, type=Plan)
    except BadQuestionError as error:
        raise BadQuestionError(f"{name}: {error.message}", hint=_again(fields, name)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        said = _not_allowed(str(error))
        message = f"{name}: {said}" if said else f"{name} is not a plan: {error}"
        raise BadQuestionError(message, hint=_again(fields, name)) from None


def _again(fields: dict[str, Any], name: str) -> str:
    """The command that makes such a plan anew, in a file beside the one that is not one."""
    command = fields.get("command")
    found = _COMMAND.fullmatch(command) if isinstance(command, str) else None
    flags = " --depth 12" if found is None else found[1] or ""
    return f"snugpt plan{flags} -o {_beside(name)}"


def _beside(name: str) -> str:
    """A file name in the present folder that is not `name`."""
    stem = Path(name).stem
    return f"{stem}-2.json" if _STEM.fullmatch(stem) else "plan-2.json"


def _not_allowed(error: str) -> str | None:
    """msgspec's line on a value that is none of a field's, with the field and what it may be."""
    found = _ENUM.fullmatch(error)
    if found is None:
        return None
    value, path = found.groups()
    kinds: list[Any] = [Plan]
    for part in re.sub(r"\[[^\]]*\]", "", path).split("."):
        kinds = [
            inner
            for kind in kinds
            for inner in _leaves(get_type_hints(kind).get(part) if _is_struct(kind) else None)
        ]
    allowed = [
        str(each) for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)
    ]
    return bad_value(path, value, ", ".join(allowed)).message if allowed else None


def _leaves(kind: Any) -> list[Any]:
    """The structs and literals within a type: `tuple[X, ...] | None` has X."""
    if get_origin(kind) is Literal or _is_struct(kind):
        return [kind]
    return [leaf for inner in get_args(kind) for leaf in _leaves(inner)]


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)

"""Config files: TOML or JSON with the fields of a Question, or with the names other trainers use.

Hyphens and underscores are the same. Flags go over a file, a file over a preset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from snugpt.errors import BadQuestionError, SnugError, bad_value, unknown_name
from snugpt.spec.question import ALIASES, Question
from snugpt.units import GIB

# A GPT-2 style trainer's names for our fields. A file that has one of the first group is one of its
# files, and what it leaves out is what that trainer has: tied weights, AdamW.
_SHAPE_NAMES = {"n_layer": "layers", "n_head": "heads", "n_embd": "width", "block_size": "seq_len"}
_OTHER_NAMES = {
    "eval_interval": "eval_every",
    "save_interval": "save_every",
    "grad_clip": "clip_norm",
}
_FOREIGN_NAMES = _SHAPE_NAMES | _OTHER_NAMES
_FOREIGN_DEFAULTS = {"style": "gpt2", "tie": True, "optimizer": "adamw"}
_ABOUT = frozenset({"name", "description"})  # words for people
_DEVICES = {"cpu": "cpu", "cuda": None, "auto": None}
LARGEST_FILE_BYTES = 1 << 20
HINT = "snugpt plan --help"


def read_config(path: Path) -> dict[str, Any]:
    """Read a config file as Question fields, values checked one by one.

    Raises:
        BadQuestionError: no such file, not TOML or JSON, an unknown or doubled key, a wrong value.
    """
    where = str(path)
    table = _table(_text(path, where), where, is_json=path.suffix.lower() == ".json")
    fields = _our_names(table, where)
    checked_question(fields, where)
    return fields


def checked_question(fields: Mapping[str, Any], where: str) -> Question:
    """Return a Question of these fields; what is wrong with them is a BadQuestionError."""
    for name in fields:
        if name not in Question.__struct_fields__:
            raise _unknown(name, where)
    try:
        return msgspec.convert(dict(fields), Question)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$.")
        field = place.rstrip("`")
        if isinstance(error.__cause__, SnugError):  # out of range: said in full already
            raise BadQuestionError(
                f"{where}: {error.__cause__.message}", hint=error.__cause__.hint
            ) from None
        shown = f"{field} = {_shown(fields.get(field))}: " if field else ""
        raise BadQuestionError(f"{where}: {shown}{_plainly(message)}", hint=HINT) from None


def reserve_bytes(value: object) -> int:
    """Return `--reserve` in bytes: a number of GiB, or a text such as "1.5GiB".

    Raises:
        BadQuestionError: it is no number from 0 up.
    """
    text = str(value).strip().lower().removesuffix("gib").removesuffix("g").strip()
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if isinstance(value, bool) or not 0 <= number <= 1 << 30:  # also refuses NaN
        raise bad_value("reserve", value, "GiB from 0 up", hint="snugpt plan --reserve 1.5")
    return round(number * GIB)


def _text(path: Path, where: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadQuestionError(f"config {where!r} can't be read: {reason}", hint=HINT) from None
    if len(raw) > LARGEST_FILE_BYTES:
        raise BadQuestionError(f"config {where!r} is larger than 1 MiB", hint=HINT)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadQuestionError(f"config {where!r} is not UTF-8 text", hint=HINT) from None


def _table(text: str, where: str, *, is_json: bool) -> dict[str, Any]:
    try:
        if is_json or text.lstrip().startswith("{"):
            kind = "JSON"
            table = json.loads(text, object_pairs_hook=_no_doubles, parse_constant=_no_constant)
        else:
            kind = "TOML"
            import tomllib

            table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise BadQuestionError(f"{where} is not {kind}: {reason}", hint=HINT) from None
    if not isinstance(table, dict):
        raise BadQuestionError(f"{where} is not a table of fields", hint=HINT)
    return table


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {doubled!r} stands there twice")
    return table


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _our_names(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Translate a file's keys to Question fields."""
    fields: dict[str, Any] = {}
    keys = {key.replace("-", "_"): value for key, value in table.items()}
    if len(keys) < len(table):
        raise BadQuestionError(f"{where}: a key is there with hyphen and underscore", hint=HINT)
    if _SHAPE_NAMES.keys() & keys.keys():
        fields |= _FOREIGN_DEFAULTS
    written: dict[str, str] = {}
    for key, value in keys.items():
        if key in _ABOUT or _is_bias(key, value, where):
            continue
        field, value = _translated(key, value, where)
        if field not in Question.__struct_fields__:
            raise _unknown(key, where)
        if field in written:
            raise BadQuestionError(
                f"{where}: {written[field]} and {key} are the same field", hint=HINT
            )
        written[field] = key
        fields[field] = value
    if fields.get("vocab_size") == 256 and "n_embd" in keys:
        fields["byte_tokens"] = True  # that trainer's character-level vocabulary
        del fields["vocab_size"]
    return {field: value for field, value in fields.items() if value is not None}


def _translated(key: str, value: Any, where: str) -> tuple[str, Any]:
    if key == "device":
        if value not in _DEVICES:
            raise bad_value(f"{where}: device", value, "cuda, cpu or auto", hint="snugpt gpus")
        return "gpu", _DEVICES[value]
    if key == "reserve":
        return key, reserve_bytes(value)
    return _FOREIGN_NAMES.get(key) or ALIASES.get(key, key), value


def _is_bias(key: str, value: Any, where: str) -> bool:
    """Whether this is `bias = false`, which is what our model has."""
    if key != "bias":
        return False
    if value is not False:
        raise bad_value(f"{where}: bias", value, "false, the model has no biases", hint=HINT)
    return True


def _unknown(name: str, where: str) -> BadQuestionError:
    known = {*Question.__struct_fields__, *ALIASES, *_FOREIGN_NAMES, *_ABOUT, "device", "bias"}
    return unknown_name(f"field in {where}:", name[:60], sorted(known), hint=HINT)


def _plainly(message: str) -> str:
    """msgspec's message without what a file can't say: "expected `int`, got `str`"."""
    message = message.replace(" | null", "")
    return message[:1].lower() + message[1:]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."

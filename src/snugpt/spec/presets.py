"""Presets: a name for a handful of Question fields, from presets.toml; the dial as d4 to d32."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from snugpt.errors import unknown_name
from snugpt.spec.question import overlay

PRESETS_FILE = Path(__file__).with_name("presets.toml")
DIAL_DEPTHS = range(4, 33, 2)


@cache
def presets() -> Mapping[str, Mapping[str, Any]]:
    """Return the Question fields of every preset by its name; the dial's come last."""
    import tomllib  # only a question with a preset pays for it

    tables = tomllib.loads(PRESETS_FILE.read_text(encoding="utf-8"))
    named = {name: overlay(table, tables["common"]) for name, table in tables["preset"].items()}
    dial = {f"d{depth}": {"style": "nanochat", "depth": depth} for depth in DIAL_DEPTHS}
    return MappingProxyType(named | dial)


def preset_fields(name: str) -> Mapping[str, Any]:
    """Return what a preset pins. Case does not count, nor hyphen against underscore.

    Raises:
        BadQuestionError: there is no such preset; the nearest name is in the message.
    """
    asked = _plain(name)
    for known, fields in presets().items():
        if _plain(known) == asked:
            return fields
    raise unknown_name("preset", name[:40], presets(), hint="snugpt plan --preset 150M")


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")

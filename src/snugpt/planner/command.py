"""Questions as command lines: what is said again gives the same plan."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from snugpt.errors import BadQuestionError
from snugpt.spec.question import Question, said_fields
from snugpt.units import GIB

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")


def command_line(question: Question, **changes: Any) -> str:
    """Return `snugpt plan` with one flag for each field that is said, `changes` put in first."""
    words = ["snugpt plan"]
    for field, value in said_fields(msgspec.structs.replace(question, **changes)).items():
        words.append(flag(field, value))
    return " ".join(words)


def started_by(num_gpus: int) -> str:
    """Return how snugpt is started on so many cards."""
    if num_gpus == 1:
        return "snugpt"
    return f"torchrun --nproc-per-node {num_gpus} -m snugpt.cli"


def refused(message: str, question: Question, **changes: Any) -> BadQuestionError:
    """Return the error for a question that `changes` would mend; its hint asks it with them."""
    return BadQuestionError(message, hint=command_line(question, **changes), changes=changes)


def plain_dial(question: Question, **changes: Any) -> Question:
    """Return the question with nothing pinned but the machine, the program and the text."""
    kept = ("task", "stack", "gpu", "num_gpus", "launcher", "reserve", "input")
    return Question(**{field: getattr(question, field) for field in kept}, **changes)


def flag(field: str, value: Any) -> str:
    """Return the flag of a field with its value, as a shell reads it."""
    name = "--" + field.replace("_", "-")
    if isinstance(value, bool):
        return name if value else name.replace("--", "--no-", 1)
    if field == "reserve":
        return f"{name} {value / GIB:.12g}"
    text = f"{value:.12g}" if isinstance(value, float) else str(value)
    return f"{name} {_quoted(text)}"


def _quoted(text: str) -> str:
    """Quote as `shlex.quote` does, without importing it."""
    return text if _PLAIN.fullmatch(text) else "'" + text.replace("'", "'\"'\"'") + "'"

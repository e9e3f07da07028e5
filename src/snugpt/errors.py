"""What can go wrong, and what each thing says to the shell.

    SnugError               exit 1
    ├── BadQuestionError    exit 2   a field has a value that can't be: name, value, range
    ├── DoesNotFitError     exit 3   the question is sound, the machine too small
    └── FailedError         exit 1   the run could not go on: disk, damaged file, missing package

An error is one line that names field, value and range, then one `hint:` line that is a command or a
value to type. The command line prints both and exits with `exit_code`; in Python they are
exceptions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class SnugError(Exception):
    """Base of every error that is meant for the user's eyes."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BadQuestionError(SnugError):
    """The question can't be answered as asked: unknown name, value out of range, contradiction.

    `changes` are the fields of the question, with their values, that would mend it, where known.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        changes: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.changes = changes


class DoesNotFitError(SnugError):
    """Nothing in the allowed choices fits the machine."""

    exit_code = 3


class FailedError(SnugError):
    """The work stopped half-way for a reason outside the question."""

    exit_code = 1


def bad_line(path: str, number: int, why: object) -> FailedError:
    """Return the error for a line of a file that is not what it should be; its hint shows it."""
    import shlex

    hint = f"sed -n {number}p {shlex.quote(path)}"
    return FailedError(f"{path} line {number}: {why}", hint=hint)


def bad_value(
    field: str, value: object, allowed: str, *, hint: str | None = None
) -> BadQuestionError:
    """Return the error for one field out of range, in the house's wording."""
    return BadQuestionError(f"{field} = {value!r} is not allowed: {allowed}", hint=hint)


def unknown_name(kind: str, name: str, known: Iterable[str], *, hint: str) -> BadQuestionError:
    """Return the error for a name that is not in the list, with the nearest one that is."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    guess = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return BadQuestionError(f"unknown {kind} {name!r}{guess}", hint=hint)

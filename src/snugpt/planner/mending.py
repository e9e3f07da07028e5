"""Hints that work: the question changed where it is wrong, and only there, until it is answered.

A refusal of the planner says what it would change (`BadQuestionError.changes`). One from below,
where no question is known, does not: then fields of the model are tried one by one. What is hinted
has been drafted, so the command is not refused in its turn.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import chain, combinations
from typing import Any

import msgspec

from snugpt.errors import BadQuestionError
from snugpt.estimate.stacks.catalogue import NEWEST, STACKS
from snugpt.planner.command import command_line, plain_dial
from snugpt.planner.draft import draft
from snugpt.planner.horizon import CorpusSize
from snugpt.planner.machine import Machine, machine_for
from snugpt.spec.question import Question, said_fields

MOST_LINKS = 8  # one question has no more than a few things wrong
MOST_VALUES = 64
# The rarest first: what is changed is what few people say on purpose.
COUNTS = ("kv_heads", "heads", "depth")
DROPPED = ("window_pattern", "mlp", "dropout", "vocab_size", "kv_heads", "heads", "width",
           "layers", "seq_len", "depth")  # fmt: skip


def with_working_hint(
    error: BadQuestionError, asked: Question, machine: Machine, corpus: CorpusSize | None
) -> BadQuestionError:
    """Return the error with the nearest question that is answered; as it was if none is found."""
    refused, question = error, asked
    for _ in range(MOST_LINKS):
        changes = _names_that_are_meant(question) or refused.changes
        if changes is None:
            found = _nearby_that_is_answered(question, machine, corpus)
            return error if found is None else _hinting(error, found)
        question = msgspec.structs.replace(question, **changes)
        again = _refusal(question, machine, corpus)
        if again is None:
            return _hinting(error, question)
        refused = again
    return error


def _hinting(error: BadQuestionError, question: Question) -> BadQuestionError:
    return BadQuestionError(error.message, hint=command_line(question))


def _refusal(
    question: Question, machine: Machine, corpus: CorpusSize | None
) -> BadQuestionError | None:
    """What stands against a question on its own card; None if it is answered."""
    try:
        here = machine if question.gpu in (None, machine.gpu.id) else machine_for(question.gpu)
        draft(question, here, corpus)
    except BadQuestionError as error:
        return error
    return None


def _nearby_that_is_answered(
    question: Question, machine: Machine, corpus: CorpusSize | None
) -> Question | None:
    every = chain(_nearby(question), (plain_dial(question, depth=12),))
    return next((each for each in every if _refusal(each, machine, corpus) is None), None)


def _nearby(question: Question) -> Iterator[Question]:
    """Questions with one field changed or left out, then with two."""
    said = said_fields(question)
    for field in COUNTS:
        if field in said:
            for number in _near(said[field]):
                yield msgspec.structs.replace(question, **{field: number})
    dropped = [field for field in DROPPED if field in said]
    for number_of_fields in (1, 2):
        for fields in combinations(dropped, number_of_fields):
            yield msgspec.structs.replace(question, **dict.fromkeys(fields))


def _near(number: int) -> list[int]:
    """Whole numbers around `number`, the nearest first."""
    low, high = max(1, number - MOST_VALUES // 2), number + MOST_VALUES // 2
    around: list[Any] = [n for n in range(low, high + 1) if n != number]
    return sorted(around, key=lambda n: (abs(n - number), -n))


def _names_that_are_meant(question: Question) -> dict[str, str] | None:
    """The known names nearest to those that are not; None if all are known, or none is near."""
    from snugpt.spec.presets import presets  # spares the import where nothing is wrong

    changes: dict[str, str] = {}
    names = {"stack": (*NEWEST, *STACKS), "preset": tuple(presets())}
    for field, known in names.items():
        said = getattr(question, field)
        if said is not None and said.strip().lower() not in map(str.lower, known):
            nearest = difflib.get_close_matches(said, known, n=1, cutoff=0.5)
            if nearest:
                changes[field] = nearest[0]
    return changes or None

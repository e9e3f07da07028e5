"""Drafts: a question made definite and every set of levers looked at, before one is simulated.

Where no depth is said the planner chooses it: the deepest of the dial that fits, ends in time and
does not read a short text over and over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.planner.command import refused
from snugpt.planner.generating import generation_candidate
from snugpt.planner.horizon import (
    FEWEST_STEPS,
    Amount,
    CorpusSize,
    batch_tokens,
    corpus_tokens,
    most_tokens,
    refuse_uneven_batch,
    target_tokens,
    tokens_in,
    total_tokens,
)
from snugpt.planner.machine import Machine
from snugpt.planner.programs import refuse_cards_without_bf16, refuse_uneven_shards
from snugpt.planner.search import Candidate, best_of, candidates
from snugpt.planner.subject import dial_of, settled, shape_of, trained_shape
from snugpt.spec.question import Question
from snugpt.spec.shape import ModelShape
from snugpt.units import SECONDS_PER_HOUR, gib

DIAL = tuple(range(2, 65, 2))
HOURS = {"cpu": 1.0}  # a run whose depth and length are both free ends in this time,
GPU_HOURS = 24.0  # on a GPU in this
# Up to four times over a text teaches nearly as much as new text (arXiv 2305.16264).
MOST_EPOCHS = 4.0
NOTHING = Amount(0, "")


class Draft(NamedTuple):
    """A question made definite. `asked` is what was said, `question` has its preset and depth."""

    asked: Question
    question: Question
    shape: ModelShape
    machine: Machine
    corpus: CorpusSize | None
    batch: Amount
    tokens: Amount
    depth_rule: str | None
    found: tuple[Candidate, ...]

    @property
    def capacity_bytes(self) -> int:
        """What is left on the machine after the reserve."""
        return self.machine.capacity_bytes - self.asked.reserve

    @property
    def fitting(self) -> list[Candidate]:
        """The sets of levers that fit, as far as arithmetic tells."""
        return [each for each in self.found if each.process_bytes <= self.capacity_bytes]

    @property
    def best(self) -> Candidate:
        """The best that fits, else the smallest of all."""
        fitting = self.fitting
        if fitting:
            return best_of(fitting, self.asked.objective)
        return best_of(list(self.found), "memory")

    @property
    def hours(self) -> float:
        """How long the best takes for all its tokens."""
        steps = -(-self.tokens.tokens // self.batch.tokens)
        return steps * self.best.step_s / SECONDS_PER_HOUR


def draft(asked: Question, machine: Machine, corpus: CorpusSize | None = None) -> Draft:
    """Return the draft of a question on a machine.

    Raises:
        BadQuestionError: the question has a field that can't be.
    """
    if asked.reserve >= machine.capacity_bytes:
        raise refused(
            f"reserve = {gib(asked.reserve)!r} is not allowed: below the"
            f" {gib(machine.capacity_bytes)} of {machine.gpu.name}",
            asked, reserve=0,
        )  # fmt: skip
    question = settled(asked)
    if question.task == "generate":
        return _generation_draft(asked, question, machine)
    if dial_of(question) is None:
        return _deepest(asked, question, machine, corpus)
    return _training_draft(asked, question, machine, corpus)


def _generation_draft(asked: Question, question: Question, machine: Machine) -> Draft:
    depth = dial_of(question)
    if question.model is not None:
        shape = trained_shape(question.model)
    elif depth is not None:
        shape = shape_of(question, depth, None)
    else:
        raise refused(
            "task = generate needs a model, a preset or a depth",
            question,
            depth=12,
        )
    found = (generation_candidate(question, shape, machine),)
    return Draft(asked, question, shape, machine, None, NOTHING, NOTHING, None, found)


def _training_draft(
    asked: Question,
    question: Question,
    machine: Machine,
    corpus: CorpusSize | None,
    depth_rule: str | None = None,
) -> Draft:
    depth = dial_of(question)
    assert depth is not None
    refuse_uneven_batch(asked)
    refuse_cards_without_bf16(asked, machine.gpu)
    shape = shape_of(question, depth, corpus.num_bytes if corpus else None)
    refuse_uneven_shards(asked, shape)

    def at(most: int | None, amount: Callable[[int], Amount]) -> Draft:
        batch = batch_tokens(question, shape, most)
        tokens = amount(batch.tokens)
        found = candidates(question, shape, machine, batch, tokens)
        return Draft(asked, question, shape, machine, corpus, batch, tokens, depth_rule, found)

    most = most_tokens(asked, question, corpus)
    first = at(most, lambda batch: total_tokens(question, shape, batch))
    hours = question.hours
    if hours is None:
        return first
    speed = first.batch.tokens / first.best.step_s
    given = tokens_in(hours, speed, first.batch.tokens)
    shrinks = asked.batch_size is None and find_stack(asked.stack).version is None
    if shrinks and given.tokens < FEWEST_STEPS * first.batch.tokens:
        most = min(given.tokens, most or given.tokens)
        first = at(most, lambda batch: given)
        speed = first.batch.tokens / first.best.step_s
    return at(most, lambda batch: tokens_in(hours, speed, batch))


def _deepest(
    asked: Question, question: Question, machine: Machine, corpus: CorpusSize | None
) -> Draft:
    """The draft of the deepest acceptable model of the dial; of the shallowest if none is."""
    limit = HOURS.get(machine.gpu.backend, GPU_HOURS)
    rule = "the deepest that fits"
    if question.hours is None:
        rule += f" and ends within {limit:g} h"
    else:
        rule += f" and sees enough tokens in {question.hours:g} h"
    if corpus is not None:
        rule += f", reading the text at most {MOST_EPOCHS:g} times"

    def at(depth: int) -> Draft:
        deeper = msgspec.structs.replace(question, depth=depth)
        return _training_draft(asked, deeper, machine, corpus, rule)

    low, high = 0, len(DIAL) - 1
    best = at(DIAL[0])
    if not _acceptable(best, limit):
        return best._replace(depth_rule="the shallowest, a deeper one would take too long")
    while low < high:  # DIAL[low] is taken for acceptable, all above `high` are not
        middle = (low + high + 1) // 2
        tried = at(DIAL[middle])
        if _acceptable(tried, limit):
            low, best = middle, tried
        else:
            high = middle - 1
    return best


def _acceptable(tried: Draft, limit_hours: float) -> bool:
    question, target = tried.question, target_tokens(tried.question, tried.shape).tokens
    if not tried.fitting:
        return False
    if question.hours is None and tried.hours > limit_hours:
        return False
    if (question.hours or question.total_tokens) and target > tried.tokens.tokens:
        return False
    corpus = tried.corpus
    return corpus is None or target <= MOST_EPOCHS * corpus_tokens(question, corpus)

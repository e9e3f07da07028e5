"""The sets of levers worth a look, mildest first: what a question pins has one value.

    on the card and exact -> the host's memory as well -> fewer bits for moments and weights

A later tier is only walked where nothing of the tiers before it fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from snugpt.estimate.making_again import selective_sets
from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.planner.command import refused
from snugpt.spec.question import Question
from snugpt.spec.recipe import SELECTIVE_STEPS, SelectiveStep, TrainingRecipe
from snugpt.spec.shape import ModelShape

LeverSet = dict[str, Any]  # by the names of a recipe's fields
Tier = tuple[LeverSet, ...]
# What changes the arithmetic, and its value that does not.
EXACT: dict[str, str] = {"state_dtype": "fp32", "weight_dtype": "master", "fp8": "off"}
# The levers that are searched beside checkpointing, and where they start.
SEARCHED = {"offload": "none", "weight_dtype": "master", "state_dtype": "fp32"}


def tiers(question: Question, shape: ModelShape) -> Iterator[Tier]:
    """Yield tuples of lever sets; those that trade exactness last, none of them with `exact`.

    Raises:
        BadQuestionError: `selective_steps` names none, or other steps than there are.
    """
    checkpoints = _checkpoints(question, shape)
    offloads = _values(question, "offload")
    formats = [
        {"state_dtype": state, "weight_dtype": weight}
        for weight, state in product(
            _values(question, "weight_dtype"), _values(question, "state_dtype")
        )
    ]
    if question.exact:
        formats = formats[:1]
    for low_bit, far in ((False, False), (False, True), (True, False), (True, True)):
        levers = tuple(
            {**checkpoint, "offload": offload, **dtypes}
            for dtypes in (formats[1:] if low_bit else formats[:1])
            for offload in (offloads[1:] if far else offloads[:1])
            for checkpoint in checkpoints
        )
        if levers:
            yield levers


def loses_nothing(tier: Tier, question: Question) -> bool:
    """Whether every set of a tier is as exact as the question allows."""
    formats = ("weight_dtype", "state_dtype")
    return all(levers[lever] == _values(question, lever)[0] for levers in tier for lever in formats)


def is_exact(recipe: TrainingRecipe) -> bool:
    """Whether every lever leaves the arithmetic as it is."""
    return all(getattr(recipe, lever) == value for lever, value in EXACT.items())


def in_words(recipe: TrainingRecipe) -> list[str]:
    """The way to checkpoint, and every other searched lever that is not at its default."""
    words = [f"checkpoint {recipe.checkpoint}"]
    if recipe.selective_steps:
        words[0] += f" ({','.join(recipe.selective_steps)})"
    for lever, default in SEARCHED.items():
        value = getattr(recipe, lever)
        if value != default:
            words.append(f"{lever} {value}" + (", inexact" if lever in EXACT else ""))
    return words


def difference(recipe: TrainingRecipe, other: TrainingRecipe) -> list[str]:
    """The searched levers of `recipe` that `other` has otherwise, in words."""
    words = []
    if (recipe.checkpoint, recipe.selective_steps) != (other.checkpoint, other.selective_steps):
        words += in_words(recipe)[:1]
    words += [
        f"{lever} {getattr(recipe, lever)}"
        for lever in SEARCHED
        if getattr(recipe, lever) != getattr(other, lever)
    ]
    return words


def _values(question: Question, lever: str) -> tuple[str, ...]:
    pinned = getattr(question, lever)
    return find_stack(question.stack).levers[lever] if pinned is None else (pinned,)


def ways_to_checkpoint(shape: ModelShape) -> list[LeverSet]:
    """Nothing again, each worthwhile set of steps again, whole blocks again: fastest first."""
    return [
        {"checkpoint": "none", "selective_steps": ()},
        *({"checkpoint": "selective", "selective_steps": s} for s in selective_sets(shape)),
        {"checkpoint": "blocks", "selective_steps": ()},
    ]


def _checkpoints(question: Question, shape: ModelShape) -> list[LeverSet]:
    """The ways to checkpoint that a question leaves open."""
    steps = _pinned_steps(question)
    if steps:
        return [{"checkpoint": "selective", "selective_steps": steps}]
    allowed = _values(question, "checkpoint")
    return [way for way in ways_to_checkpoint(shape) if way["checkpoint"] in allowed]


def _pinned_steps(question: Question) -> tuple[SelectiveStep, ...]:
    if question.selective_steps is None:
        return ()
    named = {word.strip() for word in question.selective_steps.split(",")}
    if question.checkpoint not in (None, "selective"):
        raise refused(
            f"selective_steps = {question.selective_steps!r} is not allowed: they are for"
            " checkpoint = 'selective'",
            question, selective_steps=None,
        )  # fmt: skip
    if not named <= set(SELECTIVE_STEPS):
        raise refused(
            f"selective_steps = {question.selective_steps!r} is not allowed: some of"
            f" {', '.join(SELECTIVE_STEPS)}, with commas",
            question, selective_steps="qkv,up",
        )  # fmt: skip
    return tuple(step for step in SELECTIVE_STEPS if step in named)

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
SEARCHED = {
    "sharding": "none", "offload": "none", "weight_dtype": "master", "state_dtype": "fp32",
}  # fmt: skip


def tiers(question: Question, shape: ModelShape) -> Iterator[Tier]:
    """Yield tuples of lever sets; those that trade exactness last, none of them with `exact`.

    Raises:
        BadQuestionError: `selective_steps` names none, or other steps than there are.
    """
    _refuse_pinned_inexact(question)
    checkpoints = _checkpoints(question, shape)
    offloads, shardings = _values(question, "offload"), _shardings(question)
    mild = [sharding for sharding in shardings if sharding != {"sharding": "full"}] or shardings
    formats = [
        {"state_dtype": state, "weight_dtype": weight}
        for weight, state in product(
            _values(question, "weight_dtype"), _values(question, "state_dtype")
        )
    ]
    first, low_bit = formats[:1], [] if question.exact else formats[1:]
    near, far = offloads[:1], offloads[1:]
    for dtypes, places, divided in (
        (first, near, mild),
        (first, near, [sharding for sharding in shardings if sharding not in mild]),
        (first, far, mild),
        (low_bit, near, shardings),
        (low_bit, far, mild),
    ):
        sets = product(dtypes, [{"offload": place} for place in places], divided, checkpoints)
        levers = tuple({**a, **b, **c, **d} for a, b, c, d in sets)
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
            words.append(f"{lever} {value}" + (" (inexact)" if lever in EXACT else ""))
    return [*words, "fp8 on (inexact)"] if recipe.fp8 == "on" else words


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


def _shardings(question: Question) -> list[LeverSet]:
    """The ways to divide a step of ours among several cards; of others' it is settled already."""
    stack = find_stack(question.stack)
    if stack.version is not None or ((question.num_gpus or 1) == 1 and question.sharding is None):
        return [{}]
    return [{"sharding": value} for value in _values(question, "sharding")]


def _refuse_pinned_inexact(question: Question) -> None:
    for lever, value in EXACT.items():
        pinned = {True: "on", False: "off"}.get(said := getattr(question, lever), said)
        if question.exact and pinned not in (None, value):
            raise refused(
                f"{lever} = {pinned!r} is not allowed with --exact: it rounds more",
                question, exact=None,
            )  # fmt: skip


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

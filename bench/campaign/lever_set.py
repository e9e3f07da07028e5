"""The campaign's set of levers: each by itself on one model, and the sets people will pull."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from snugpt.errors import BadQuestionError
from snugpt.estimate.levers import why_not
from snugpt.estimate.stacks.catalogue import SNUGPT
from snugpt.planner.pulled import values
from snugpt.spec.runtime import Runtime

from .configurations import Configuration, shape_of, training, training_recipe

CARD = Runtime(device="cuda", attention="flash", capability=(9, 0))
DEPTH, BATCH = 12, 8
# What stands together in plans: exact levers, those that trade bits, the smallest of all.
TOGETHER: tuple[dict[str, Any], ...] = (
    {"checkpoint": "selective", "selective_steps": ("pointwise", "qkv", "up"), "accumulation": 2},
    {"checkpoint": "blocks", "offload": "optimizer"},
    {"state_dtype": "int8", "weight_dtype": "bf16"},
    {"state_dtype": "int8", "weight_dtype": "bf16", "checkpoint": "blocks", "fp8": "on"},
    {"clip_norm": 0.0},  # gradients are given to the optimizer in backward
    {"clip_norm": 0.0, "state_dtype": "int8", "weight_dtype": "bf16", "checkpoint": "blocks"},
)


def lever_set() -> tuple[Configuration, ...]:
    """The plain step, then every lever that the trainer has and a card with FP8 can be given."""
    found = [training(f"nano-d{DEPTH}-b{BATCH}-levers-none", "nanochat", DEPTH, BATCH)]
    seen = [dict[str, Any](loss="chunked", checkpoint="none", selective_steps=())]
    for changes in (*values(), *TOGETHER):
        if dict(changes) not in seen and _possible(dict(changes)):
            seen.append(dict(changes))
            name = f"nano-d{DEPTH}-b{BATCH}-{'-'.join(_words(changes))}"
            found.append(training(name, "nanochat", DEPTH, BATCH, **changes))
    return tuple(found)


def _words(changes: Any) -> Iterator[str]:
    """The changes as parts of a name; steps of `selective` follow it."""
    for lever, value in changes.items():
        if isinstance(value, tuple):
            yield from value
        elif lever in ("checkpoint", "loss"):
            yield str(value)
        else:
            yield f"{lever.replace('_', '')}-{value}"


def _possible(changes: dict[str, Any]) -> bool:
    """Whether it differs from the plain step, and the trainer and the card can do it."""
    asked = {"style": "nanochat", "depth": DEPTH, "batch": BATCH}
    plain = training_recipe(asked, batch=BATCH)
    try:
        recipe = training_recipe({**asked, **changes}, batch=BATCH)
    except BadQuestionError:
        return False
    return recipe != plain and _has(changes) and why_not(shape_of(asked), recipe, CARD) is None


def _has(changes: dict[str, Any]) -> bool:
    """Whether snugpt's trainer has each of the values."""
    named = {lever: value for lever, value in changes.items() if lever in SNUGPT.levers}
    return all(value in SNUGPT.levers[lever] for lever, value in named.items())

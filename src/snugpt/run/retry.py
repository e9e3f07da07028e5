"""What a run does when memory runs out: the step again from its start, with smaller micro-batches.

A step can be taken again as long as no optimizer has begun to change a weight: then gradients are
all that it left behind. Rows, rate and random state are those of the first try; the same rows in
other groups give the same gradient up to the order of a sum. (Dropout draws other masks: they are
drawn group by group.)
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import nn

from snugpt.spec.memory import Phase
from snugpt.spec.recipe import TrainingRecipe

MOST_RETRIES = 2  # of one run, over every time it is started


class Retries:
    """The recipe in effect, how often it was made smaller, and whether a step can be taken again.

    `phase` is the one that runs, None before the first step, "evaluate" between steps. `whole`
    says that the weights are those of a finished step.
    """

    def __init__(self, planned: TrainingRecipe) -> None:
        self.planned = self.recipe = planned
        self.count = 0
        self.phase: Phase | None = None
        self.whole = True

    def begin(self, device: torch.device) -> None:
        """Say that a try of a step begins: keep the random state it begins with."""
        # As bytes: a tensor of 5 KB would show among the tensors of the step.
        self._random = {"cpu": torch.get_rng_state().numpy().tobytes()}
        if device.type == "cuda":
            self._random["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes()
        self.phase, self.whole = "forward", True

    def mark(self, phase: Phase) -> None:
        """Say that a phase of the step begins."""
        self.phase = phase
        updates = "backward" if self.recipe.steps_in_backward else "optimizer"
        self.whole = self.whole and phase != updates

    def end(self) -> None:
        """Say that the step has ended."""
        self.phase, self.whole = "evaluate", True

    @property
    def possible(self) -> bool:
        """Whether the step that failed can be taken again in smaller parts.

        Of several processes the others would wait for this one: they can't.
        """
        left = self.count < MOST_RETRIES and self.recipe.device_batch_size > 1
        return left and self.whole and self.recipe.world_size == 1

    def make_smaller(self, device: torch.device) -> TrainingRecipe:
        """Return the recipe of the next try, and put the random state of the step's start back."""
        self.recipe = smaller(self.recipe)
        self.count += 1
        torch.set_rng_state(_tensor(self._random["cpu"]))
        if device.type == "cuda":
            torch.cuda.set_rng_state(_tensor(self._random["cuda"]), device)
        return self.recipe

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run goes on with the recipe in effect."""
        if self.count == 0:
            return {}
        return {
            "retries": {
                "count": self.count,
                "device_batch_size": self.recipe.device_batch_size,
                "planned_sha256": _digest(self.planned),
            }
        }

    def go_on_from(self, state: Mapping[str, Any]) -> bool:
        """Take over what a checkpoint of the same plan says; return whether the recipe changed.

        A plan with other levers is another try: it starts with its own batch and no retries.
        """
        kept = state.get("retries")
        if not kept or kept["planned_sha256"] != _digest(self.planned):
            return False
        self.count = kept["count"]
        self.recipe = with_batch(self.planned, kept["device_batch_size"])
        return True


def smaller(recipe: TrainingRecipe) -> TrainingRecipe:
    """Return the recipe at half the micro-batch and twice the accumulation.

    Where the batch is odd: at the largest batch below half that divides the rows of a step. Tokens
    per step are unchanged.
    """
    rows = recipe.device_batch_size * recipe.grad_accum_steps
    halves = range(recipe.device_batch_size // 2, 0, -1)
    return with_batch(recipe, next(batch for batch in halves if rows % batch == 0))


def with_batch(recipe: TrainingRecipe, batch: int) -> TrainingRecipe:
    """Return the recipe with another micro-batch and the same rows per step."""
    rows = recipe.device_batch_size * recipe.grad_accum_steps
    return msgspec.structs.replace(recipe, device_batch_size=batch, grad_accum_steps=rows // batch)


def make_room(model: nn.Module, device: torch.device) -> None:
    """Let go of what a step that failed left behind: gradients, and blocks that PyTorch caches.

    Call it after the `except` block: the error's frames hold the step's tensors until then.
    """
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _digest(recipe: TrainingRecipe) -> str:
    return hashlib.sha256(msgspec.json.encode(recipe)).hexdigest()


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)

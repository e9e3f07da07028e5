"""Which levers can be pulled together, and why others can't: asked by planner, trainer and tracer.

One small function per lever. What is refused here was never derived, or would change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from snugpt.estimate.compiled import why_not_compiled
from snugpt.estimate.fp8 import why_not_fp8
from snugpt.estimate.loss_scale import why_not_fp16
from snugpt.estimate.making_again import why_not_selective
from snugpt.estimate.offload import why_not_offload
from snugpt.estimate.sharding import why_not_sharded
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

Why = Callable[[ModelShape, TrainingRecipe, Runtime], str | None]


class Objection(NamedTuple):
    """The lever that can't have its value, why, and the value it always can have."""

    lever: str
    value: str
    because: str
    instead: str

    @property
    def mend(self) -> dict[str, str | None]:
        """The field of a Question that takes the lever back."""
        return {self.lever: None if self.lever == "fp8" else self.instead}  # a flag without a value


def why_not(shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime) -> Objection | None:
    """Return what stands against a recipe's levers on a device, or None.

    Only for recipes of the `snugpt` stack; another program's levers are its own.
    """
    for lever, (default, why) in _CHECKS.items():
        value = getattr(recipe, lever)
        because = why(shape, recipe, runtime) if value != default else None
        if because is not None:
            return Objection(lever, value, because, default)
    return None


def _why_not_bf16_weights(
    shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime
) -> str | None:
    if recipe.compute_dtype == "fp16":
        return "fp16 steps keep fp32 weights: what is scaled must not be rounded to 8 bits"
    if recipe.compile == "on":
        return "what the compiler makes of bf16 weights was not derived"
    return None


# What a lever is by default, which needs no reason, and what may stand against another value.
_CHECKS: dict[str, tuple[str, Why]] = {
    "compile": ("off", why_not_compiled),
    "weight_dtype": ("master", _why_not_bf16_weights),
    "fp8": ("off", why_not_fp8),
    "compute_dtype": ("fp32", why_not_fp16),
    "sharding": ("none", why_not_sharded),
    "checkpoint": ("none", why_not_selective),
    "offload": ("none", why_not_offload),
}

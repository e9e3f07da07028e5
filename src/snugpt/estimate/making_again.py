"""The lever `checkpoint = selective`: which of a layer's tensors are made again, and at what cost.

The twin of `model/making_again.py` and of the calls in `model/gpt.py` that name their steps:

    pointwise   the norms' and the activation's outputs, where they are kept beside their inputs
    qkv         queries, keys and values as attention reads them, value embeddings gathered again
    up          what the activation reads and makes, from the norm's output

A layer of nanochat style keeps 20 bytes per token and channel in bf16 (22 with value embeddings):
norm outputs 2 + 2, q, k, v 6, attention's output 2, the activation's 8. `qkv` leaves 14, `up` 12,
both 6. The other styles keep norm inputs and what the activation reads as well; `pointwise` brings
gpt2 to the same 20 and llama, whose activation reads two tensors of 8/3 the width, to 22.7.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from snugpt.estimate.flops import multiplied_again
from snugpt.estimate.operations import Call
from snugpt.estimate.stacks.snugpt import Part
from snugpt.spec.recipe import SELECTIVE_STEPS, SelectiveStep, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

Steps = tuple[SelectiveStep, ...]


def making_again(part: Part, steps: Steps) -> Part:
    """A layer of which some calls run again in the backward pass instead of keeping results."""
    end = next(i for i, op in enumerate(part.operations) if op.name == "residual add") + 1
    attention, mlp = part.operations[:end], part.operations[end:]
    attend = next(i for i, op in enumerate(attention) if op.name == "attention")
    activate = next(i for i, op in enumerate(mlp) if op.name == "activation")
    heads, projected = attention[1:attend], mlp[1:activate]
    gathered = tuple(op.result for op in heads if op.name == "embedding")
    calls = (
        ({"pointwise"}, attention[:1], (attention[0].result,)),
        ({"qkv"}, heads, (*attention[attend].reads, *gathered)),
        ({"pointwise"}, mlp[:1], (mlp[0].result,)),
        ({"up"}, projected, tuple(op.result for op in projected)),
        ({"pointwise", "up"}, mlp[activate : activate + 1], (mlp[activate].result,)),
    )
    chosen = (Call(ops, results) for any_of, ops, results in calls if any_of & set(steps))
    return replace(part, made_again=tuple(chosen))


def why_not_selective(shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime) -> str | None:
    """What stands against the steps of `checkpoint = selective`, or None."""
    if recipe.checkpoint != "selective":
        return None
    if recipe.compile == "on":
        return "compiled layers choose for themselves what is made again"
    if "pointwise" in recipe.selective_steps and not saves_pointwise(shape):
        return f"step pointwise saves nothing in {shape.style} style, which keeps no input beside"
    if "qkv" in recipe.selective_steps and shape.dropout and runtime.attention == "math":
        return "step qkv is not for attention with dropout on the CPU, which keeps copies by head"
    return None


def saves_pointwise(shape: ModelShape) -> bool:
    """Whether norms and activations keep their inputs; nanochat's keep what their reader keeps."""
    return shape.style != "nanochat"


def selective_sets(shape: ModelShape) -> tuple[Steps, ...]:
    """The sets of steps worth trying, cheapest first.

    `pointwise` costs no product, so where it saves anything it is in every set.
    """
    free: Steps = ("pointwise",) if saves_pointwise(shape) else ()
    costly = [step for step in SELECTIVE_STEPS if step != "pointwise"]
    sets = [(*free, *more) for n in range(len(costly) + 1) for more in combinations(costly, n)]
    return tuple(sorted((s for s in sets if s), key=lambda s: multiplied_again(shape, s)))

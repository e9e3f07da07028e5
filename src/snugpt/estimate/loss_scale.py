"""The scaled loss of fp16: what lies in memory for it, and where it can't be had.

The twin of `model/loss_scale.py`.
"""

from __future__ import annotations

from snugpt.estimate.operations import FP32, INT32, INT64, Buffer, Net
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape


def loss_scale(net: Net) -> tuple[Buffer, ...]:
    """`LossScale`: the scale, a counter of good steps and one of those not taken; and what it told
    the optimizers last, whether the step is taken and whether not."""
    if net.compute_dtype != "fp16":
        return ()
    sizes = FP32, INT32, INT64, FP32, FP32
    return tuple(net.fixed("loss scale", "optimizer", size, "4 x 4 and 8") for size in sizes)


def scale_of_loss(net: Net) -> tuple[Buffer, ...]:
    """The number that a step multiplies its loss with, and keeps to its end."""
    return (net.fixed("loss", "logits", FP32, "4"),) if net.compute_dtype == "fp16" else ()


def shares(net: Net) -> tuple[Buffer, ...]:
    """Where an update shrinks a weight: the share of it that is taken, and what is left."""
    if net.compute_dtype != "fp16":
        return ()
    taken, left = (net.fixed("update scratch", "optimizer", FP32, "4") for _ in range(2))
    return taken, left, taken, left


def why_not_fp16(shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime) -> str | None:
    """Return why a recipe can't compute in fp16 on a device, or None."""
    if recipe.compute_dtype != "fp16":
        return None
    if runtime.device != "cuda":
        return "it is for CUDA; a CPU has no fast way for it"
    if recipe.weight_dtype == "bf16":
        return "weights in bf16 are for computing in bf16 or fp32"
    if recipe.world_size > 1:
        return "the scale of its loss is that of one card"
    return None

"""The time of copies between host and device: what no computing hides.

Bytes are counted from the timeline. Copies of activations run beside the forward and the backward
pass, those of optimizer state beside the updates, and a link carries both directions at once: a
phase lasts as long as its computing or its copies, whichever is longer.
"""

from __future__ import annotations

from snugpt.estimate.memory import runtime_of, timeline_of
from snugpt.spec.gpu import Gpu
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import ModelShape

# Share of a link's rate that pinned copies reach: 25 GB/s of PCIe 4.0 x16. Assumed, recalled.
LINK_SHARE = 0.8
# PCIe 3.0 x16, for a card whose link is not known. Assumed.
UNKNOWN_LINK_BYTES_PER_S = 15.75e9
FORWARD_SHARE = {"none": 1 / 3, "selective": 1 / 3, "blocks": 1 / 4}  # of a step's arithmetic


def waiting_s(
    shape: ModelShape, recipe: TrainingRecipe, gpu: Gpu, arithmetic_s: float, optimizer_s: float
) -> float:
    """Seconds of a step in which the device waits for copies, beside what it computes.

    `arithmetic_s` is all of forward and backward, `optimizer_s` all updates.
    """
    if recipe.offload == "none":
        return 0.0
    per_sequence, per_step = bytes_one_way(shape, recipe, gpu)
    link = (gpu.host_link_bytes_per_s or UNKNOWN_LINK_BYTES_PER_S) * LINK_SHARE
    sequences = recipe.total_batch_tokens / recipe.seq_len / recipe.world_size
    each_way_s = sequences * per_sequence / link
    forward_s = arithmetic_s * FORWARD_SHARE[recipe.checkpoint]
    beside_updates_s = optimizer_s + (arithmetic_s - forward_s) * recipe.steps_in_backward
    return (
        max(0.0, each_way_s - forward_s)
        + max(0.0, each_way_s - (arithmetic_s - forward_s))
        + max(0.0, per_step / link - beside_updates_s)
    )


def bytes_one_way(shape: ModelShape, recipe: TrainingRecipe, gpu: Gpu) -> tuple[int, int]:
    """Bytes that cross the link each way: for each sequence of a micro-batch, and for each step."""
    timeline = timeline_of(shape, recipe, runtime_of(shape, recipe, gpu, num_threads=1))
    return (
        sum(buffer.sequence_bytes for buffer in timeline.host),
        sum(buffer.fixed_bytes for buffer in timeline.host),
    )

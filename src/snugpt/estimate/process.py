"""From allocated bytes to what the device must have: reserved, then the whole process, as bands.

Nothing here has been compared with a GPU of ours. What each width rests on stands beside it; the
figures come from bench/results/reserved_band.txt. Snapshots of real runs are to narrow them
(`estimate/replay.py`).
"""

from __future__ import annotations

from snugpt.estimate.simulation import simulate
from snugpt.estimate.stacks.catalogue import stack_of
from snugpt.estimate.timeline import Timeline
from snugpt.spec.memory import BytesBand
from snugpt.spec.recipe import Recipe, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.units import GIB, MIB

# CUDA context and loaded kernels. Published: 141 MiB on a T4, 0.13 GiB on an A2000, 0.62 GiB on a
# 5090.
CONTEXT_BYTES = BytesBand(low=int(0.13 * GIB), expected=int(0.45 * GIB), high=int(0.75 * GIB))

# What NCCL takes beside PyTorch: little for one rank, channels and buffers between several.
# Assumed: nobody publishes it for nanochat.
NCCL_ALONE_BYTES = BytesBand(low=0, expected=int(0.2 * GIB), high=int(0.5 * GIB))
NCCL_BYTES = BytesBand(low=int(0.2 * GIB), expected=int(0.8 * GIB), high=int(2.0 * GIB))

# Eager, one stream: reserved is simulated event by event. Above it, for what the walk does not
# know: 24 steps of 0.8 to 11.3 GiB played with events in a somewhat other order and scratch in
# between held at most 1.153 times (native) and 1.133 times (expandable) what the walked step held,
# in 1152 variations; those above 8 GiB at most 1.022 times. A tenth and 64 MiB cover all of them.
# No published pair is of an eager GPT, so the tenth stays although the simulation alone would allow
# less. With expandable segments pages go back one by one before memory runs out: what must be held
# is less than what is. nanochat's 20 layers ran at batch 32 on 80 GB cards, 73.7 GiB allocated.
RESERVED_FACTOR, EXPANDABLE_FACTOR = 1.10, 1.02
RESERVED_REST_BYTES = 64 * MIB

# FSDP2. On 2 processes over gloo runs of tiny models took 1.07 to 1.45 times the walk, most of it
# in evaluation: gloo's own thread lets a gathered tensor go late, each run at another moment.
# On CUDA it works on streams of its own, which share no memory: not tried, assumed.
FULL_FACTOR = {"cpu": 1.6, "cuda": 1.2}

# Compiled steps of others, published pairs: 18 runs with one shape reserved 1.001 to 1.171 times
# what they allocated, median 1.038, the five on one card at most 1.064: a tenth covers those.
# Eleven of modded-nanogpt, where validation or a growing batch brings a second shape, 1.36 to 1.73:
# the bands are not for runs of several shapes. What makes the difference a snapshot would tell.

# Python, torch, the kernels' own buffers and the text at hand, before the first tensor: 220 MiB
# are resident after `import torch` of the CPU build, 500 after the CUDA build's. With what malloc
# keeps back, processes were 470 to 1270 MiB above their allocated peak in runs that allocated 0.11
# to 0.58 GiB (one 2-core Linux machine, torch 2.13, both builds). Assumed elsewhere.
CPU_BASE_BYTES = BytesBand(low=300 * MIB, expected=700 * MIB, high=1250 * MIB)
CPU_KEPT_EXPECTED, CPU_KEPT_HIGH = 1.1, 1.5


def reserved_band(
    timeline: Timeline, batch: int, runtime: Runtime, peak: int, *, expandable: bool = False
) -> tuple[BytesBand, int]:
    """Reserved bytes of an eager step and, with the unsplit rest of blocks, allocated bytes.

    `peak` is what the timeline comes to without the allocator.
    """
    if runtime.device == "cpu":  # malloc hands out what is asked for
        return BytesBand(low=peak, expected=peak, high=peak), peak
    simulated = simulate(timeline, batch, expandable=expandable)
    high = _highest_reserved(simulated.reserved_bytes, expandable)
    low = simulated.allocated_bytes
    return BytesBand(low=low, expected=simulated.reserved_bytes, high=high), low


def sharded_band(reserved: BytesBand, recipe: Recipe, runtime: Runtime) -> BytesBand:
    """The band of reserved bytes, wider where FSDP2 gathers weights beside the step."""
    if not isinstance(recipe, TrainingRecipe) or recipe.sharding != "full":
        return reserved
    high = int(reserved.high * FULL_FACTOR[runtime.device])
    return BytesBand(low=reserved.low, expected=reserved.expected, high=high)


def process_band(
    reserved: BytesBand, runtime: Runtime, outside: BytesBand = CONTEXT_BYTES
) -> BytesBand:
    """What the device must have: reserved and what lies outside PyTorch."""
    if runtime.device == "cuda":
        return BytesBand(
            low=reserved.low + outside.low,
            expected=reserved.expected + outside.expected,
            high=reserved.high + outside.high,
        )
    return BytesBand(
        low=reserved.low + CPU_BASE_BYTES.low,
        expected=int(reserved.expected * CPU_KEPT_EXPECTED) + CPU_BASE_BYTES.expected,
        high=int(reserved.high * CPU_KEPT_HIGH) + CPU_BASE_BYTES.high,
    )


def outside_bytes(recipe: Recipe | None) -> BytesBand:
    """What lies on the card beside PyTorch: the CUDA context, and NCCL under torchrun."""
    if not isinstance(recipe, TrainingRecipe) or recipe.launcher == "python":
        return CONTEXT_BYTES
    nccl = NCCL_BYTES if recipe.world_size > 1 else NCCL_ALONE_BYTES
    return BytesBand(
        low=CONTEXT_BYTES.low + nccl.low,
        expected=CONTEXT_BYTES.expected + nccl.expected,
        high=CONTEXT_BYTES.high + nccl.high,
    )


def highest_process_bytes(peak: int, runtime: Runtime, recipe: Recipe | None = None) -> int:
    """What a process whose tensors peak at `peak` may come to, before the simulation is asked.

    Without a recipe it is somebody's own program on one card.
    """
    if isinstance(recipe, TrainingRecipe) and recipe.sharding == "full":
        peak = int(peak * FULL_FACTOR[runtime.device])
    if runtime.device == "cpu":
        return CPU_BASE_BYTES.high + int(peak * CPU_KEPT_HIGH)
    expandable = recipe is not None and stack_of(recipe).expandable_segments
    return outside_bytes(recipe).high + _highest_reserved(peak, expandable)


def _highest_reserved(num_bytes: int, expandable: bool) -> int:
    factor = EXPANDABLE_FACTOR if expandable else RESERVED_FACTOR
    return int(num_bytes * factor) + RESERVED_REST_BYTES

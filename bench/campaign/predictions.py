"""What the estimate says beforehand; torch-free, so that the parent can ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from snugpt.errors import BadQuestionError
from snugpt.estimate.memory import batch_of, memory_estimate, runtime_of, timeline_of
from snugpt.planner.machine import this_processor
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.gpu import Gpu
from snugpt.spec.memory import MemoryEstimate
from snugpt.spec.recipe import Recipe
from snugpt.spec.shape import ModelShape


def gpu_of(device: str, machine: dict[str, Any]) -> Gpu:
    """The catalogue's row of the card that was found, or one made of what the driver said."""
    if device == "cpu":
        return this_processor().gpu
    try:
        return find_gpu(machine["name"])
    except BadQuestionError:
        major, minor = machine["capability"]
        return Gpu(
            id=machine["name"], name=machine["name"], backend="cuda",
            memory_bytes=machine["total_bytes"], usable_bytes=machine["total_bytes"],
            bandwidth_bytes_per_s=0.0, flops={}, capability=(major, minor),
        )  # fmt: skip


def predict(shape: ModelShape, recipe: Recipe, gpu: Gpu, num_threads: int) -> MemoryEstimate:
    """The estimate that `snugpt plan` would print."""
    return memory_estimate(shape, recipe, gpu, num_threads=num_threads)


def phases_of(shape: ModelShape, recipe: Recipe, gpu: Gpu, num_threads: int) -> dict[str, int]:
    """Allocated bytes within each phase, scratch inside kernels included, slack left out."""
    timeline = timeline_of(shape, recipe, runtime_of(shape, recipe, gpu, num_threads))
    return {str(phase): size for phase, size in timeline.read(batch_of(recipe))[1].items()}


def largest_batch(cap_bytes: int, bytes_of: Callable[[int], int]) -> int:
    """The largest batch whose bytes are within the cap, 0 where not even one is."""
    low, high = 0, 1
    while bytes_of(high) <= cap_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= cap_bytes else (low, middle)
    return low


def predicted_boundary(cap_bytes: int, estimate: Callable[[int], MemoryEstimate]) -> dict[str, Any]:
    """The largest batch by the reserved bytes (the pessimistic end gives `low`) and by allocated.

    The cap bounds what PyTorch's allocator holds, so its context does not count.
    """
    counters: dict[str, Callable[[MemoryEstimate], int]] = {
        "low": lambda e: e.reserved_bytes.high,
        "expected": lambda e: e.reserved_bytes.expected,
        "high": lambda e: e.allocated_bytes,
    }
    known: dict[int, MemoryEstimate] = {}

    def of(batch: int) -> MemoryEstimate:
        if batch not in known:
            known[batch] = estimate(batch)
        return known[batch]

    found = {
        name: largest_batch(cap_bytes, lambda b, read=read: read(of(b)))
        for name, read in counters.items()
    }
    return {"cap_bytes": cap_bytes, "batch": found}


def as_json(estimate: MemoryEstimate) -> dict[str, Any]:
    """Plain objects for a record."""
    found: dict[str, Any] = msgspec.to_builtins(estimate)
    return found

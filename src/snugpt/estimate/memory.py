"""From a recipe and a device to a MemoryEstimate: requested, allocated, reserved, process.

Only requested and allocated are derived. Reserved is simulated on CUDA; the process adds what lies
outside PyTorch, which is assumed until records narrow it. The band carries that doubt, once.
"""

from __future__ import annotations

from snugpt.estimate.generation import generation_timeline
from snugpt.estimate.operations import Buffer
from snugpt.estimate.process import outside_bytes, process_band, reserved_band, sharded_band
from snugpt.estimate.stacks.catalogue import stack_of
from snugpt.estimate.timeline import Alive, Timeline
from snugpt.spec.gpu import Gpu
from snugpt.spec.memory import Basis, MemoryEstimate, MemoryTerm
from snugpt.spec.recipe import LEVERS, GenerationRecipe, Recipe
from snugpt.spec.runtime import Runtime, runtime_for
from snugpt.spec.shape import ModelShape

_timelines: dict[tuple[object, ...], Timeline] = {}


def timeline_of(shape: ModelShape, recipe: Recipe, runtime: Runtime) -> Timeline:
    """Return the timeline of a recipe; it is walked once for every batch it is asked about."""
    if isinstance(recipe, GenerationRecipe):
        lengths = recipe.prompt_tokens, recipe.max_new_tokens
        key: tuple[object, ...] = shape, runtime, lengths, recipe.kv_dtype, recipe.weight_dtype
    else:
        key = (
            shape, runtime, recipe.seq_len, recipe.compute_dtype, recipe.chunk_tokens,
            recipe.grad_accum_steps > 1, recipe.steps_in_backward, recipe.clips,
            recipe.stack, recipe.world_size, recipe.launcher,
            *(getattr(recipe, lever) for lever in LEVERS),
        )  # fmt: skip
    found = _timelines.get(key)
    if found is None:
        if len(_timelines) > 4096:
            _timelines.clear()
        if isinstance(recipe, GenerationRecipe):
            found = generation_timeline(shape, recipe, runtime)
        else:
            found = stack_of(recipe).timeline(shape, recipe, runtime)
        _timelines[key] = found
    return found


def batch_of(recipe: Recipe) -> int:
    """Sequences that are on the device at once."""
    return recipe.batch if isinstance(recipe, GenerationRecipe) else recipe.device_batch_size


def peak_bytes(shape: ModelShape, recipe: Recipe, runtime: Runtime) -> int:
    """Allocated bytes at the peak without the allocator's slack: arithmetic once walked."""
    return timeline_of(shape, recipe, runtime).peak_bytes(batch_of(recipe))


def memory_estimate(
    shape: ModelShape,
    recipe: Recipe,
    gpu: Gpu,
    *,
    num_threads: int = 1,
    reserve_bytes: int = 0,
    capacity_bytes: int | None = None,
) -> MemoryEstimate:
    """Predict the peak of one step or one generation, to the byte where PyTorch is deterministic.

    `reserve_bytes` of the device are left to others, a desktop's display say. `capacity_bytes`
    stands for what the device has free today where that is known.
    """
    runtime = runtime_of(shape, recipe, gpu, num_threads)
    timeline, batch = timeline_of(shape, recipe, runtime), batch_of(recipe)
    alive, _ = timeline.read(batch)
    requested, requested_phases = timeline.read(batch, workspace=False)
    expandable = stack_of(recipe).expandable_segments
    reserved, allocated = reserved_band(
        timeline, batch, runtime, alive.bytes, expandable=expandable
    )
    reserved = sharded_band(reserved, recipe, runtime)
    process = process_band(reserved, runtime, outside_bytes(recipe))
    capacity = (gpu.usable_bytes if capacity_bytes is None else capacity_bytes) - reserve_bytes
    return MemoryEstimate(
        requested_bytes=requested.bytes,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        process_bytes=process,
        capacity_bytes=capacity,
        headroom_bytes=capacity - process.high,
        peak_phase=alive.phase,
        phases={str(phase): size for phase, size in requested_phases.items()},
        terms=_terms(alive, timeline, batch, allocated, runtime),
    )


def runtime_of(shape: ModelShape, recipe: Recipe, gpu: Gpu, num_threads: int) -> Runtime:
    """The runtime of a recipe on a device; generation has no dropout."""
    if isinstance(recipe, GenerationRecipe):
        return runtime_for(gpu, recipe.weight_dtype, 0.0, num_threads)
    return runtime_for(gpu, recipe.compute_dtype, shape.dropout, num_threads)


def _terms(
    alive: Alive, timeline: Timeline, batch: int, allocated: int, runtime: Runtime
) -> tuple[MemoryTerm, ...]:
    """What is alive at the peak by name, largest first; the last term is the allocator's slack."""
    sizes: dict[str, int] = {}
    kinds: dict[str, dict[str, int]] = {}
    first: dict[str, Buffer] = {}
    for buffer, count in alive.buffers.items():
        size = timeline.bytes_of(buffer, batch)
        sizes[buffer.name] = sizes.get(buffer.name, 0) + count * size
        formulas = kinds.setdefault(buffer.name, {})
        formulas[buffer.formula] = formulas.get(buffer.formula, 0) + count
        first.setdefault(buffer.name, buffer)
    terms = [
        MemoryTerm(
            name=name,
            category=first[name].category,
            bytes=size,
            formula=_formula(first[name], size, kinds[name]),
            basis=_basis(first[name], runtime),
        )
        for name, size in sorted(sizes.items(), key=lambda item: -item[1])
        if size
    ]
    slack = allocated - sum(term.bytes for term in terms)
    if slack:
        terms.append(
            MemoryTerm(
                name="allocator slack",
                category="slack",
                bytes=slack,
                formula="rest of blocks above 1 MiB that are not split",
                basis="derived",
            )
        )
    return tuple(terms)


def _formula(buffer: Buffer, size: int, counts: dict[str, int]) -> str:
    """How a term comes about: elements of parameters, else each formula and how often it occurs."""
    if buffer.category in ("gradients", "optimizer") or buffer.name.startswith("weights"):
        widths = {text.rpartition("·")[2] for text in counts}
        width = widths.pop() if len(widths) == 1 else ""
        each = int(width) if width in ("1", "2") else 4
        return f"{size // each:,} x {each}"
    parts = [text if n == 1 else f"{n} x {text}" for text, n in counts.items()]
    return " + ".join(parts[:3]) + (" + ..." if len(parts) > 3 else "")


def _basis(buffer: Buffer, runtime: Runtime) -> Basis:
    if buffer.category in ("weights", "optimizer", "kv_cache", "batch"):
        return "exact"
    if buffer.category == "workspace" and runtime.device == "cuda":
        return "assumed"
    return "derived"

"""The picture of a plan: its predicted step against its card."""

from __future__ import annotations

from snugpt.estimate.memory import batch_of, runtime_of, timeline_of
from snugpt.estimate.picture import draw
from snugpt.estimate.timeline import Timeline
from snugpt.planner.machine import default_num_threads
from snugpt.spec.plan import Plan
from snugpt.spec.recipe import GenerationRecipe
from snugpt.units import count, plural


def picture_of(
    plan: Plan, measured: Timeline | None = None, *, measured_label: str = "traced"
) -> str:
    """Return the timeline of a plan's step, or of its generation, as the text of an SVG file.

    `measured` is the same step from another source, its bytes as they are and not per sequence.
    """
    recipe = plan.recipe
    runtime = runtime_of(plan.shape, recipe, plan.gpu, default_num_threads())
    return draw(
        timeline_of(plan.shape, recipe, runtime),
        batch_of(recipe),
        title=title_of(plan),
        capacity_bytes=plan.memory.capacity_bytes,
        process_bytes=plan.memory.process_bytes,
        measured=measured,
        measured_label=measured_label,
    )


def title_of(plan: Plan) -> str:
    """What is planned, in one line."""
    shape, recipe = plan.shape, plan.recipe
    if isinstance(recipe, GenerationRecipe):
        verb, lengths = "Generate with", f"{recipe.prompt_tokens} + {recipe.max_new_tokens} tokens"
    else:
        verb, lengths = "Train", f"{recipe.seq_len} tokens"
    return (
        f"{verb} {shape.style}, {plural(shape.num_layers, 'layer')}, {count(plan.parameters.total)}"
        f" parameters, on {plan.gpu.name}: {batch_of(recipe)} x {lengths}"
    )

"""A record of the campaign as the ledger's own Measurement, so that one reader grades both."""

from __future__ import annotations

from typing import Any

import msgspec

from snugpt.spec.measurement import Environment, Measurement, new_id, utc_now
from snugpt.spec.memory import MemoryEstimate
from snugpt.spec.recipe import Recipe, TrainingRecipe
from snugpt.spec.shape import ModelShape

PROGRAM = "snugpt campaign"


def measurement_of(
    record: dict[str, Any],
    shape: ModelShape,
    recipe: Recipe,
    estimate: MemoryEstimate,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Plain objects of a Measurement; a run that failed has its environment from the parent's."""
    here = record["environment"] or environment
    counted = record["measured"] or {}
    driver = counted.get("driver") or {}
    phases = {phase: peaks["allocated_bytes"] for phase, peaks in counted.get("phases", {}).items()}
    time = utc_now()
    measurement = Measurement(
        id=new_id(time),
        time=time,
        program=PROGRAM,
        outcome=record["outcome"],
        gpu_id=here.get("gpu_id"),
        gpu_name=here["device"],
        shape=shape,
        recipe=recipe,
        predicted=estimate,
        allocated_bytes=counted.get("allocated_bytes"),
        reserved_bytes=counted.get("reserved_bytes"),
        process_bytes=driver.get("above_start_bytes"),
        counters={
            "allocated": "torch.cuda.memory_stats" if driver else "CpuAllocations",
            **({"process": driver["counted_by"]} if driver else {}),
        },
        phases=phases or None,
        alloc_retries=counted.get("num_alloc_retries"),
        num_ooms=counted.get("num_ooms"),
        tokens_per_s=rate(counted.get("step_ms"), recipe),
        environment=msgspec.convert(
            {name: here.get(name) for name in Environment.__struct_fields__}, Environment
        ),
    )
    found: dict[str, Any] = msgspec.to_builtins(measurement)
    return found


def rate(step_ms: list[float] | None, recipe: Recipe) -> float | None:
    """Tokens per second of the fastest timed step."""
    if not step_ms or not isinstance(recipe, TrainingRecipe):
        return None
    return recipe.total_batch_tokens / min(step_ms) * 1e3

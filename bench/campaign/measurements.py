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
    process_bytes, counted_by = process_of(driver)
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
        process_bytes=process_bytes,
        counters={
            "allocated": "torch.cuda.memory_stats" if driver else "CpuAllocations",
            **({} if process_bytes is None else {"process": counted_by}),
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


def process_of(driver: dict[str, Any]) -> tuple[int | None, str]:
    """What the process had of the card at its end, and who says so; None on the CPU.

    By the driver's account above what was in use before; else all that CUDA says is in use.
    """
    if driver.get("above_start_bytes") is not None:
        return driver["above_start_bytes"], f"{driver['counted_by']}, above its start"
    return driver.get("mem_get_info_used_bytes"), "torch.cuda.mem_get_info, the whole card"


def rate(step_ms: list[float] | None, recipe: Recipe) -> float | None:
    """Tokens per second of the fastest timed step."""
    if not step_ms or not isinstance(recipe, TrainingRecipe):
        return None
    return recipe.total_batch_tokens / min(step_ms) * 1e3

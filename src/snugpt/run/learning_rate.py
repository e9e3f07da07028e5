"""The learning rate over a run: linear warm-up, flat, linear cool-down (trapezoid)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from snugpt.spec.recipe import Schedule


def rate_factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """The share of the base rate at `step` of `num_steps`, a pure function of the step.

    Rises over the first `warmup_fraction` of the steps, falls to `final_fraction` over the last
    `cooldown_fraction`.
    """
    warmup = round(schedule.warmup_fraction * num_steps)
    cooldown = round(schedule.cooldown_fraction * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = num_steps - step
    if left <= cooldown:
        share = left / (cooldown + 1)
        return schedule.final_fraction + (1 - schedule.final_fraction) * share
    return 1.0


def set_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to its base rate times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

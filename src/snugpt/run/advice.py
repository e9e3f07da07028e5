"""What to change about a run that is out of memory: the lever, and the command that pulls it."""

from __future__ import annotations

import torch

from snugpt.planner.command import command_line
from snugpt.planner.pulled import Pulled, pulled
from snugpt.run.retry import Retries, smaller
from snugpt.run.run_folder import RunFolder
from snugpt.spec.memory import Phase
from snugpt.spec.plan import Plan
from snugpt.spec.recipe import TrainingRecipe
from snugpt.units import gib

SMALLEST_SHARE = 0.02  # of the peak: a lever that saves less is no advice


def advice(plan: Plan, recipe: TrainingRecipe, folder: RunFolder, phase: Phase | None) -> str:
    """Return the command that goes on with the lever that saves most in the phase that failed.

    Exact levers come first. Without one: a smaller batch, then a smaller model under another name.
    """
    lever = best_lever(plan, recipe, phase)
    if lever is not None:
        return _command(plan, folder, recipe, lever)
    if recipe.device_batch_size > 1:
        return _command(plan, folder, recipe, None)
    dial = "layers" if plan.question.layers is not None else "depth"
    fewer = {dial: max(1, plan.shape.num_layers // 2)}
    return _train(command_line(plan.question, **fewer), f"{folder.path.name}-2")


def where(step: int, phase: Phase | None) -> str:
    """Say where memory ran out, `step` steps being done."""
    if phase is None:
        return "out of memory before the first step"
    if phase == "evaluate":
        return f"out of memory in the evaluation after step {step}"
    return f"out of memory in step {step + 1} ({phase})"


def retry_line(plan: Plan, recipe: TrainingRecipe, step: int, phase: Phase | None) -> str:
    """What is told when a step is taken again: how, and what would spare it the next time."""
    lever = best_lever(plan, recipe, phase)
    instead = "" if lever is None else f"; {in_words(lever)}"
    return (
        f"{where(step, phase)}: taken again with"
        f" device_batch_size {recipe.device_batch_size} x grad_accum_steps"
        f" {recipe.grad_accum_steps}, the same tokens{instead}"
    )


def resumed_line(step: int, recipe: TrainingRecipe, retries: Retries) -> str:
    """What is told when a run goes on from a checkpoint."""
    because = f" with device_batch_size {recipe.device_batch_size}, as memory ran out before"
    return f"resumed after step {step}{because if retries.count else ''}"


def best_lever(plan: Plan, recipe: TrainingRecipe, phase: Phase | None) -> Pulled | None:
    """Return the lever that saves most, an exact one if there is one; None if nothing helps."""
    known = phase if phase in plan.memory.phases else None
    found = pulled(plan.shape, recipe, plan.gpu, num_threads=torch.get_num_threads(), phase=known)
    least = SMALLEST_SHARE * plan.memory.allocated_bytes
    helpful = [each for each in found if each.bytes_saved >= least]
    return max(helpful, key=lambda each: (each.exact, each.bytes_saved), default=None)


def in_words(lever: Pulled) -> str:
    """A lever with what it is predicted to save."""
    named = ", ".join(
        f"{name} {','.join(value) if isinstance(value, tuple) else value}"
        for name, value in lever.changes.items()
        if value != ()
    )
    return f"{named} saves {gib(lever.bytes_saved)}" + ("" if lever.exact else ", not exact")


def _command(plan: Plan, folder: RunFolder, recipe: TrainingRecipe, lever: Pulled | None) -> str:
    """The run's own command with a smaller batch, and a lever pulled."""
    changes = dict(lever.changes) if lever is not None else {}
    if "selective_steps" in changes:
        changes["selective_steps"] = ",".join(changes["selective_steps"]) or None
    if "fp8" in changes:
        changes["fp8"] = changes["fp8"] == "on"
    batch = recipe.device_batch_size if lever is not None else smaller(recipe).device_batch_size
    question = command_line(
        plan.question, device_batch_size=batch, grad_accum_steps=None, **changes
    )
    return _train(question, folder.path.name)


def _train(command: str, name: str) -> str:
    return f"{command.replace('snugpt plan', 'snugpt train', 1)} --name {name}"

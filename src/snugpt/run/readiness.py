"""Whether a plan can be run here as it is; asked before anything is written."""

from __future__ import annotations

import importlib.util

import msgspec
import torch

from snugpt.errors import BadQuestionError, DoesNotFitError, FailedError
from snugpt.estimate.host import GPU_HOST_BYTES, host_bytes
from snugpt.estimate.levers import Objection, why_not
from snugpt.estimate.memory import memory_estimate, runtime_of, timeline_of
from snugpt.model.stored_state import require_torchao
from snugpt.planner.command import command_line
from snugpt.run.distributed import refuse_other_number
from snugpt.run.reports import Notice, Watcher
from snugpt.run.run_folder import training_recipe
from snugpt.spec.host import cpu_capacity_bytes
from snugpt.spec.plan import Plan
from snugpt.spec.recipe import TrainingRecipe
from snugpt.units import gib, gib_of


def runnable(plan: Plan, watcher: Watcher) -> Plan:
    """Return the plan to run, predicted anew if somebody has edited it.

    Raises:
        BadQuestionError: it is a plan to generate, or with levers that can't be pulled here.
        DoesNotFitError: it does not fit.
        FailedError: it is for a device that is not here, or int8 without torchao.
    """
    recipe = training_recipe(plan)
    refuse_levers(plan, recipe)
    refuse_other_number(plan, recipe)
    if recipe.state_dtype == "int8":
        require_torchao()
    plan = predicted_anew(plan, watcher)
    if not plan.fits:
        raise DoesNotFitError(
            f"the plan does not fit: process"
            f" {gib_of(plan.memory.process_bytes.high, plan.memory.capacity_bytes)}",
            hint=plan.alternatives[0].command if plan.alternatives else "snugpt plan --depth 4",
        )
    backend = plan.gpu.backend
    if backend != "cpu" and not (backend == "cuda" and torch.cuda.is_available()):
        cuda = backend == "cuda"
        why = "torch finds no CUDA device here" if cuda else f"{backend} can't train yet"
        raise FailedError(
            f"the plan is for {plan.gpu.name}, and {why}",
            hint=f"snugpt plan --gpu cpu --layers {plan.shape.num_layers}",
        )
    if backend != "cpu":
        refuse_host_memory(plan, training_recipe(plan), cpu_capacity_bytes())
    return plan


def refuse_host_memory(plan: Plan, recipe: TrainingRecipe, available_bytes: int) -> None:
    """Say so where the host has no room for what `offload` pins beside the process.

    Pinned memory is never swapped out: too much of it takes the whole machine down, not the run.

    Raises:
        DoesNotFitError: it has not.
    """
    runtime = runtime_of(plan.shape, recipe, plan.gpu, torch.get_num_threads())
    pinned = host_bytes(timeline_of(plan.shape, recipe, runtime), recipe.device_batch_size)
    needed = pinned + GPU_HOST_BYTES
    if pinned and needed > available_bytes:
        raise DoesNotFitError(
            f"offload = {recipe.offload!r} needs {gib(needed)} of host memory, {gib(pinned)} of it"
            f" pinned; {gib(available_bytes)} are available",
            hint=command_line(plan.question, offload="none").replace("plan", "train", 1),
        )


def refuse_levers(plan: Plan, recipe: TrainingRecipe) -> None:
    """Say what stands against the levers: of an edited plan, or of what is installed here.

    Raises:
        BadQuestionError: something does.
    """
    runtime = runtime_of(plan.shape, recipe, plan.gpu, torch.get_num_threads())
    objection = why_not(plan.shape, recipe, runtime) or _missing(recipe)
    if objection is not None:
        raise BadQuestionError(
            f"{objection.lever} = {objection.value!r} is not allowed: {objection.because}",
            hint=command_line(plan.question, **objection.mend).replace("plan", "train", 1),
        )


def _missing(recipe: TrainingRecipe) -> Objection | None:
    """What a lever needs and is not installed here."""
    if recipe.compile == "on" and importlib.util.find_spec("triton") is None:
        because = "torch.compile needs Triton for CUDA, and it is not installed here"
        return Objection("compile", "on", because, "off")
    return None


def predicted_anew(plan: Plan, watcher: Watcher) -> Plan:
    """The plan with the prediction of what will really run, should somebody have edited it."""
    memory = memory_estimate(
        plan.shape, plan.recipe, plan.gpu,
        num_threads=torch.get_num_threads(), capacity_bytes=plan.memory.capacity_bytes,
    )  # fmt: skip
    if memory.allocated_bytes == plan.memory.allocated_bytes:
        return plan
    watcher(
        Notice(
            text=f"predicted anew: allocated {gib(memory.allocated_bytes)},"
            f" the plan says {gib(plan.memory.allocated_bytes)}"
        )
    )
    return msgspec.structs.replace(plan, memory=memory, fits=memory.fits)

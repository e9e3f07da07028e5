"""Whether a plan can be run here as it is; asked before anything is written."""

from __future__ import annotations

import importlib.util

import msgspec
import torch

from snugpt.errors import BadQuestionError, DoesNotFitError, FailedError
from snugpt.estimate.compiled import why_not_compiled
from snugpt.estimate.memory import memory_estimate, runtime_of
from snugpt.planner.command import command_line
from snugpt.run.reports import Notice, Watcher
from snugpt.run.run_folder import training_recipe
from snugpt.spec.plan import Plan
from snugpt.spec.recipe import TrainingRecipe
from snugpt.units import gib


def runnable(plan: Plan, watcher: Watcher) -> Plan:
    """Return the plan to run, predicted anew if somebody has edited it.

    Raises:
        BadQuestionError: it is a plan to generate, or to compile what can't be compiled here.
        DoesNotFitError: it does not fit.
        FailedError: it is for a device that is not here.
    """
    refuse_to_compile(plan, training_recipe(plan))
    plan = predicted_anew(plan, watcher)
    if not plan.fits:
        raise DoesNotFitError(
            f"the plan does not fit: process {gib(plan.memory.process_bytes.high)} of"
            f" {gib(plan.memory.capacity_bytes)}",
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
    return plan


def refuse_to_compile(plan: Plan, recipe: TrainingRecipe) -> None:
    """Say what stands against `compile = on`: an edited plan, or no Triton on this machine.

    Raises:
        BadQuestionError: something does.
    """
    if recipe.compile == "off":
        return
    runtime = runtime_of(plan.shape, recipe, plan.gpu, torch.get_num_threads())
    why = why_not_compiled(plan.shape, recipe, runtime)
    if why is None and importlib.util.find_spec("triton") is None:
        why = "torch.compile needs Triton for CUDA, and it is not installed here"
    if why is not None:
        raise BadQuestionError(
            f"compile = 'on' is not allowed: {why}",
            hint=command_line(plan.question, compile="off").replace("plan", "train", 1),
        )


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

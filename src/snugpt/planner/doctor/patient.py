"""The run that failed, made definite: what it was, on which card, and what it lacked."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from snugpt.errors import SnugError
from snugpt.estimate.memory import memory_estimate
from snugpt.planner.answer import answer
from snugpt.planner.doctor.diagnosis import hidden_bytes
from snugpt.planner.doctor.program import ProgramRun
from snugpt.planner.doctor.report import Event, OutOfMemory
from snugpt.planner.machine import CPU_ID, Machine, this_processor
from snugpt.spec.catalogue import catalogue, find_gpu
from snugpt.spec.gpu import Gpu
from snugpt.spec.memory import MemoryEstimate
from snugpt.spec.question import Question
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import ModelShape

SAME_CAPACITY_SHARE = 0.003  # drivers keep a little more or less for themselves


class Patient(NamedTuple):
    """The run as it failed, made definite. `slip_bytes` is what it held beyond the prediction,
    `lacking_bytes` what a mend has to save at least."""

    question: Question
    shape: ModelShape
    recipe: TrainingRecipe
    machine: Machine
    memory: MemoryEstimate
    slip_bytes: int
    lacking_bytes: int
    words: tuple[str, ...]
    run: str | None

    @property
    def capacity_bytes(self) -> int:
        """What the process could have on the card as it was."""
        return self.machine.capacity_bytes


def patient_of(run: ProgramRun, event: Event, gpu: str | None) -> Patient | None:
    """Return the run as a plan; None where none can stand for it.

    `gpu` is the card the user names; else it is the plan's, the log's, or the one of the catalogue
    with just that capacity.

    Raises:
        BadQuestionError: there is no such card.
    """
    named = find_gpu(gpu) if gpu is not None and gpu.lower() != CPU_ID else None
    report = event if isinstance(event, OutOfMemory) else None
    plan = run.plan
    if plan is not None and isinstance(plan.recipe, TrainingRecipe):
        reserve = plan.question.reserve
        capacity = plan.memory.capacity_bytes + reserve if named is None else named.usable_bytes
        machine = Machine(gpu=named or plan.gpu, capacity_bytes=capacity)
        machine = _as_it_was(machine, report, reserve)
        memory = predicted(plan.shape, plan.recipe, machine)
        return _patient(plan.question, plan.shape, plan.recipe, machine, memory, run, report)
    if run.question is None or run.question.task != "train":
        return None
    card = named or card_of(run, event)
    machine = (
        this_processor() if card is None else Machine(gpu=card, capacity_bytes=card.usable_bytes)
    )
    if card is None and run.question.gpu != CPU_ID:
        return None
    machine = _as_it_was(machine, report, run.question.reserve)
    question = msgspec.structs.replace(run.question, gpu=machine.gpu.id, input=None, reserve=0)
    try:
        made = answer(question, machine=machine, num_alternatives=0)
    except SnugError:
        return None
    if not isinstance(made.recipe, TrainingRecipe):
        return None
    said = msgspec.structs.replace(run.question, gpu=machine.gpu.id)
    return _patient(said, made.shape, made.recipe, machine, made.memory, run, report)


def card_of(run: ProgramRun, event: Event) -> Gpu | None:
    """Return the card a run was on: the log's, else the one whose capacity the message gives."""
    said = run.question.gpu if run.question is not None else None
    if said is not None and said.lower() != CPU_ID:
        try:
            return find_gpu(said)
        except SnugError:
            return None
    capacity = event.capacity_bytes if isinstance(event, OutOfMemory) else None
    if capacity is None or not isinstance(event, OutOfMemory) or event.backend != "cuda":
        return None
    cards = [card for card in catalogue().values() if card.backend == "cuda"]
    nearest = min(cards, key=lambda card: abs(card.usable_bytes - capacity))
    apart = abs(nearest.usable_bytes - capacity)
    return nearest if apart <= SAME_CAPACITY_SHARE * capacity else None


def _as_it_was(machine: Machine, report: OutOfMemory | None, reserve: int) -> Machine:
    """The machine with the capacity that the message gives, less what others held or were left."""
    capacity, held = machine.capacity_bytes, 0
    if report is not None:
        capacity = min(capacity, report.capacity_bytes or capacity)
        held = report.others_bytes + hidden_bytes(report)
    capacity -= max(held, reserve)
    if report is not None and report.limit_bytes is not None:
        capacity = min(capacity, report.limit_bytes)
    return msgspec.structs.replace(machine, capacity_bytes=max(1, capacity))


def _patient(
    question: Question,
    shape: ModelShape,
    recipe: TrainingRecipe,
    machine: Machine,
    memory: MemoryEstimate,
    run: ProgramRun,
    report: OutOfMemory | None,
) -> Patient:
    slip, lacking = 0, 1
    if report is not None and report.tried_bytes is not None:
        if report.allocated_bytes is not None:
            needed = report.allocated_bytes + report.tried_bytes
            slip = max(0, needed - memory.allocated_bytes)
        if report.free_bytes is not None:
            lacking = max(1, report.tried_bytes - report.free_bytes)
    return Patient(question, shape, recipe, machine, memory, slip, lacking, run.words, run.run)


def predicted(shape: ModelShape, recipe: TrainingRecipe, machine: Machine) -> MemoryEstimate:
    """The whole estimate of a recipe on a machine."""
    return memory_estimate(
        shape, recipe, machine.gpu,
        num_threads=machine.num_threads, capacity_bytes=machine.capacity_bytes,
    )  # fmt: skip

"""Mends that are checked: each is the run with one thing changed, predicted again.

What leaves the arithmetic as it is comes first, then what does not, then another model or card. A
mend is said to fit when it saves what was lacking, on the card as it was: less what others held,
and with room for what the run held beyond its own prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from snugpt.errors import SnugError
from snugpt.estimate.fp8 import FIRST_FP8
from snugpt.estimate.levers import why_not
from snugpt.estimate.memory import runtime_of
from snugpt.estimate.speed import speed_estimate
from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.planner.answer import answer
from snugpt.planner.command import command_line
from snugpt.planner.doctor.commands import with_flags
from snugpt.planner.doctor.patient import Patient, predicted
from snugpt.planner.horizon import automatic_batch_tokens
from snugpt.planner.levers import EXACT, in_words, ways_to_checkpoint
from snugpt.planner.programs import run_command
from snugpt.planner.search import divisors
from snugpt.planner.subject import SHORTEST_CONTEXT
from snugpt.spec.catalogue import catalogue
from snugpt.spec.plan import Plan
from snugpt.spec.question import Question
from snugpt.spec.recipe import TrainingRecipe
from snugpt.units import gib, plural

Kind = Literal["exact", "inexact", "model", "machine", "program"]
MOST_DEPTHS = 8
EXACT_LEVERS = ("loss", "offload")


class Mend(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to change. `fits` is None where nothing could be planned; bytes by process."""

    change: str
    kind: Kind
    command: str | None = None
    saves_bytes: int | None = None
    process_bytes: int | None = None
    fits: bool | None = None
    time_factor: float | None = None


def planned_mends(patient: Patient) -> tuple[Mend, ...]:
    """Return the mends of a planned run, best first: those that fit, exact before inexact."""
    exact = sorted(_exact(patient), key=_rank)
    inexact = [mend for mend in _inexact(patient) if mend.fits]
    fitting = [mend for mend in exact if mend.fits]
    if fitting:
        return (*fitting, *inexact[:1])
    together = list(_together(patient))
    return (*together, *inexact, *_smaller_models(patient), *_larger_card(patient), *exact[:1])


def _rank(mend: Mend) -> tuple[float, int]:
    """The fastest first, of those what saves most."""
    return round(mend.time_factor or 1.0, 2), -(mend.saves_bytes or 0)


def _exact(patient: Patient) -> Iterator[Mend]:
    yield from _smaller_batch(patient)
    recipe, stack = patient.recipe, find_stack(patient.recipe.stack)
    if len(stack.levers["checkpoint"]) > 1:
        for way in ways_to_checkpoint(patient.shape):
            steps = ",".join(way["selective_steps"]) or None
            changes = {"checkpoint": way["checkpoint"], "selective_steps": steps}
            other = msgspec.structs.replace(recipe, **way)
            yield from _tried(patient, in_words(other)[0], "exact", other, changes)
    for lever in EXACT_LEVERS:
        for value in stack.levers[lever]:
            other = msgspec.structs.replace(recipe, **{lever: value})
            yield from _tried(patient, f"{lever} {value}", "exact", other, {lever: value})
    if recipe.launcher == "torchrun" and recipe.world_size == 1:
        other = msgspec.structs.replace(recipe, launcher="python")
        change = "started with python, not torchrun"
        yield from _tried(patient, change, "exact", other, {"launcher": "python"})


def _smaller_batch(patient: Patient) -> Iterator[Mend]:
    """The largest batch that fits with the same total, else the smallest there is."""
    recipe = patient.recipe
    rows = recipe.device_batch_size * recipe.grad_accum_steps
    mend = None
    for batch in divisors(rows):
        if batch >= recipe.device_batch_size:
            continue
        passes = rows // batch
        other = msgspec.structs.replace(recipe, device_batch_size=batch, grad_accum_steps=passes)
        changes: dict[str, Any] = {"device_batch_size": batch}
        if patient.question.grad_accum_steps is not None:
            changes["grad_accum_steps"] = passes
        change = f"device_batch_size {batch}, {plural(passes, 'pass', 'passes')} a step"
        mend = next(_tried(patient, change, "exact", other, changes), mend)
        if mend is not None and mend.fits:
            break
    if mend is not None:
        yield mend


def _inexact(patient: Patient) -> Iterator[Mend]:
    recipe, stack = patient.recipe, find_stack(patient.recipe.stack)
    for lever in EXACT:
        for value in stack.levers[lever]:
            if lever == "fp8" and (patient.machine.gpu.capability or (0, 0)) < FIRST_FP8:
                continue
            other = msgspec.structs.replace(recipe, **{lever: value})
            changes = {lever: True if lever == "fp8" else value}
            yield from _tried(patient, f"{lever} {value}", "inexact", other, changes)


def _tried(
    patient: Patient, change: str, kind: Kind, other: TrainingRecipe, changes: dict[str, Any]
) -> Iterator[Mend]:
    """Yield the mend if the levers can be pulled and it saves anything."""
    machine = patient.machine
    if other == patient.recipe:
        return
    runtime = runtime_of(patient.shape, other, machine.gpu, machine.num_threads)
    if other.stack == "snugpt" and why_not(patient.shape, other, runtime) is not None:
        return
    try:
        memory = predicted(patient.shape, other, machine)
        command = _command(patient, other, changes)
    except SnugError:
        return
    saves = patient.memory.process_bytes.high - memory.process_bytes.high
    if saves <= 0:
        return
    needed = memory.process_bytes.high + patient.slip_bytes
    before = speed_estimate(patient.shape, patient.recipe, machine.gpu).step_s
    yield Mend(
        change=change,
        kind=kind,
        command=command,
        saves_bytes=saves,
        process_bytes=needed,
        fits=needed <= patient.capacity_bytes and saves >= patient.lacking_bytes,
        time_factor=speed_estimate(patient.shape, other, machine.gpu).step_s / before,
    )


def _command(patient: Patient, other: TrainingRecipe, changes: dict[str, Any]) -> str:
    """What runs it: the user's own words where they are known, else a whole new line."""
    question = msgspec.structs.replace(patient.question, **changes)
    version = find_stack(other.stack).version
    if version is None:
        return _train_command(question, patient.run)
    own = {
        version.options[name]: value for name, value in changes.items() if name in version.options
    }
    if patient.words and len(own) == len(changes) and "fp8" not in own:
        return with_flags(patient.words, own)
    automatic = automatic_batch_tokens(question, patient.shape)
    return run_command(question, patient.shape, other, automatic)


def _train_command(question: Question, run: str | None) -> str:
    line = command_line(question).replace("snugpt plan", "snugpt train", 1)
    if run is None:
        return line
    name = run.rstrip("/").rpartition("/")[2]
    return line + (f" --name {name}-2" if name.replace("-", "").replace(".", "").isalnum() else "")


def _asked(patient: Patient, **changes: Any) -> Plan | None:
    """The plan of the question with changes on the card as it was, its batch free again."""
    machine = msgspec.structs.replace(
        patient.machine, capacity_bytes=max(1, patient.machine.capacity_bytes - patient.slip_bytes)
    )
    free = dict.fromkeys(("device_batch_size", "grad_accum_steps", "input")) | changes
    free["reserve"] = 0  # it is taken from the machine already
    if patient.question.input is not None and not patient.question.byte_tokens:
        free["vocab_size"] = patient.shape.vocab_size
    try:
        made = answer(
            msgspec.structs.replace(patient.question, **free), machine=machine, num_alternatives=0
        )
    except SnugError:
        return None
    return made if made.fits else None


def _together(patient: Patient) -> Iterator[Mend]:
    """Several exact levers at once, where no one is enough."""
    if patient.recipe.stack != "snugpt":
        return
    levers = dict.fromkeys(("checkpoint", "selective_steps", *EXACT_LEVERS))
    made = _asked(patient, exact=True, **levers)
    if made is None or not isinstance(made.recipe, TrainingRecipe):
        return
    other = made.recipe
    changes: dict[str, Any] = {"device_batch_size": other.device_batch_size}
    for lever in ("checkpoint", *EXACT_LEVERS):
        if getattr(other, lever) != getattr(patient.recipe, lever):
            changes[lever] = getattr(other, lever)
    if other.selective_steps:
        changes["selective_steps"] = ",".join(other.selective_steps)
    whole = {"grad_accum_steps": None, **changes}
    question = msgspec.structs.replace(patient.question, **whole)
    change = ", ".join(f"{field} {value}" for field, value in changes.items())
    yield _planned(patient, made, change, "exact", _train_command(question, patient.run))


def _smaller_models(patient: Patient) -> Iterator[Mend]:
    """Half the context, and the deepest model of the same kind that fits."""
    half = patient.recipe.seq_len // 2
    if half >= SHORTEST_CONTEXT:
        yield from _other_model(patient, f"seq_len {half}", {"seq_len": half})
    question, layers = patient.question, patient.shape.num_layers
    field = "depth" if question.layers is None and question.preset is None else "layers"
    tried = sorted({max(1, layers * n // MOST_DEPTHS) for n in range(1, MOST_DEPTHS)}, reverse=True)
    for number in tried:
        found = list(_other_model(patient, f"{field} {number}", {field: number}))
        if found:
            yield found[0]
            return


def _other_model(patient: Patient, change: str, changes: dict[str, Any]) -> Iterator[Mend]:
    made = _asked(patient, **changes)
    if made is None or not isinstance(made.recipe, TrainingRecipe):
        return
    batch = made.recipe.device_batch_size
    whole = {**changes, "device_batch_size": batch, "grad_accum_steps": None}
    question = msgspec.structs.replace(patient.question, **whole)
    if find_stack(made.stack).version is None:
        command = _train_command(question, patient.run)
    else:
        automatic = automatic_batch_tokens(question, made.shape)
        command = run_command(question, made.shape, made.recipe, automatic)
    yield _planned(patient, made, f"{change}, device_batch_size {batch}", "model", command)


def _larger_card(patient: Patient) -> Iterator[Mend]:
    """The smallest card of the catalogue that holds the run as it was."""
    needed = patient.memory.process_bytes.high + patient.slip_bytes
    least = patient.machine.gpu.capability or (0, 0)
    cards = [
        card
        for card in catalogue().values()
        if card.usable_bytes >= needed and (card.capability or (0, 0)) >= least
    ]
    if not cards:
        return
    card = min(cards, key=lambda card: card.usable_bytes)
    yield Mend(
        change=f"the same on the {card.name}, {gib(card.usable_bytes)}",
        kind="machine",
        command=command_line(patient.question, gpu=card.id),
        process_bytes=needed,
        fits=True,
    )


def _planned(patient: Patient, made: Plan, change: str, kind: Kind, command: str) -> Mend:
    needed = made.memory.process_bytes.high + patient.slip_bytes
    before = patient.memory.process_bytes.high + patient.slip_bytes
    return Mend(
        change=change,
        kind=kind,
        command=command,
        saves_bytes=before - needed,
        process_bytes=needed,
        fits=made.fits,
    )

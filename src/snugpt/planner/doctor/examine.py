"""From a log to a finding: what happened, what held the memory, why, and what to do."""

from __future__ import annotations

from pathlib import Path

import msgspec

from snugpt.errors import SnugError
from snugpt.planner.doctor.advice import first_mends, general_mends
from snugpt.planner.doctor.diagnosis import cause_of, main_event, what_happened, what_held, why
from snugpt.planner.doctor.mends import Mend, Patient, patient_of, planned_mends
from snugpt.planner.doctor.messages import events_in
from snugpt.planner.doctor.program import ProgramRun, program_of, run_folder_of
from snugpt.planner.doctor.reading import LogText, Progress, plain, read_log
from snugpt.planner.doctor.report import Event, Killed, NotANumber, OutOfMemory
from snugpt.spec.plan import Plan, read_plan
from snugpt.units import gib

SCHEMA = 1
PLAN_FILE = "plan.json"
LOG_NAMES = ("run.log", "train.log", "log.txt", "stderr", "metrics.jsonl")
MOST_MENDS = 6


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a log tells. The three lines are for people, `events` for programs."""

    schema: int = SCHEMA
    log: str
    recognised: bool
    program: str
    cause: str | None = None
    happened: str = ""
    held: str = ""
    why: str = ""
    mends: tuple[Mend, ...] = ()
    notes: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    events: tuple[Event, ...] = ()


def examine(path: Path, gpu: str | None = None, progress: Progress = lambda share: None) -> Finding:
    """Return what is found in a log, or in the folder of a run.

    `gpu` is the card it ran on, where the log does not say.

    Raises:
        BadQuestionError: there is no such log or card, or it is no text.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = next((path / name for name in LOG_NAMES if (path / name).is_file()), path)
    return examine_text(read_log(path, progress), str(path), folder, gpu)


def examine_text(
    log: LogText, name: str, folder: Path | None = None, gpu: str | None = None
) -> Finding:
    """Return what is found in the lines of a log; a plan.json in `folder` is of its run."""
    events = events_in(log.lines)
    event = main_event(events)
    plan = _plan_of(log, folder)
    until = event.line if event is not None else len(log.lines)
    run = program_of(log.lines, until, plan)
    if event is None:
        return Finding(log=plain(name), recognised=False, program=run.name)
    patient = patient_of(run, event, gpu) if _is_about_memory(event, run) else None
    mends = (*first_mends(event, run), *_mends(event, run, patient))
    return Finding(
        log=plain(name),
        recognised=True,
        program=run.name,
        cause=cause_of(event) if isinstance(event, OutOfMemory) else None,
        happened=what_happened(event, events, run),
        held=what_held(event, run, None if patient is None else patient.memory),
        why=why(event, events, run),
        mends=mends[:MOST_MENDS],
        notes=tuple(_notes(event, run, patient, log)),
        also=tuple(dict.fromkeys(_title(each) for each in events if _title(each) != _title(event))),
        events=events,
    )


def _is_about_memory(event: Event, run: ProgramRun) -> bool:
    """Whether a smaller run would mend it; the RAM's trouble only where training was in RAM."""
    on_cpu = run.plan is not None and run.plan.gpu.backend == "cpu"
    on_cpu = on_cpu or (run.question is not None and run.question.gpu == "cpu")
    if isinstance(event, OutOfMemory):
        return event.backend != "cpu" or on_cpu
    return isinstance(event, Killed) and on_cpu


def _mends(event: Event, run: ProgramRun, patient: Patient | None) -> tuple[Mend, ...]:
    planned = () if patient is None else planned_mends(patient)
    return planned or general_mends(event, run)


def _plan_of(log: LogText, folder: Path | None) -> Plan | None:
    """The plan of a run of snugpt: in the folder it says it writes to, or beside the log."""
    said = run_folder_of(log.lines)
    places = [Path(said)] if said is not None else []
    if folder is not None:
        places += [folder / said] if said is not None else []
        places.append(folder)
    for place in places:
        try:
            if (place / PLAN_FILE).is_file():
                return read_plan(place / PLAN_FILE)
        except (SnugError, OSError, ValueError):  # damaged, or no path at all
            continue
    return None


def _notes(event: Event, run: ProgramRun, patient: Patient | None, log: LogText) -> list[str]:
    notes = list(run.assumed)
    if not log.whole:
        notes.append(
            f"the log has {gib(log.num_bytes)}: its head, its tail and what stands near a failure"
            " were read"
        )
    if patient is not None:
        card = f"planned for {patient.machine.gpu.name} with {gib(patient.capacity_bytes)}"
        notes.append(f"{card}, as {patient.recipe.stack}")
        if patient.slip_bytes:
            notes.append(
                f"the run held {gib(patient.slip_bytes)} more than predicted; the mends leave room"
                " for that"
            )
    elif isinstance(event, OutOfMemory) and event.backend != "cpu" and run.question is not None:
        notes.append("the card is not in the log: with --gpu CARD the mends are checked")
    if patient is None and isinstance(event, OutOfMemory | Killed):
        notes.append("the mends are not checked: no plan of ours stands for this program")
    if isinstance(event, NotANumber) and run.plan is not None:
        notes.append("its checkpoints from before are kept")
    return notes


def _title(event: Event) -> str:
    return str(type(event).__struct_config__.tag).replace("_", " ")

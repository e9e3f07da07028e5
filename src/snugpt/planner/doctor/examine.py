"""From a log to a finding: what happened, what held the memory, why, and what to do."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from snugpt.errors import BadQuestionError, SnugError
from snugpt.planner.doctor.advice import first_mends, general_mends
from snugpt.planner.doctor.counterpart import in_snugpt
from snugpt.planner.doctor.diagnosis import cause_of, main_event, what_happened, what_held, why
from snugpt.planner.doctor.mends import Mend, planned_mends
from snugpt.planner.doctor.messages import events_in
from snugpt.planner.doctor.patient import Patient, patient_of
from snugpt.planner.doctor.program import ProgramRun, plan_places, program_of
from snugpt.planner.doctor.reading import LogText, Progress, plain, read_log
from snugpt.planner.doctor.report import Event, Killed, NotANumber, OutOfMemory
from snugpt.spec.measurement import measurement_from_json
from snugpt.spec.plan import Plan, read_plan
from snugpt.units import gib

SCHEMA = 1
PLAN_FILE = "plan.json"
MEASUREMENT_FILE = "measurement.json"
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
    if not os.path.isdir(path):  # False, not an error, for what no file can be named
        return examine_text(read_log(path, progress), str(path), path.parent, gpu)
    logs = [path / name for name in LOG_NAMES if (path / name).is_file()]
    if not logs and not (path / PLAN_FILE).is_file():
        raise BadQuestionError(
            f"log {str(path)!r} is a folder without a plan or a log", hint=f"ls {path}"
        )
    log = read_log(logs[0], progress) if logs else LogText((), 0, whole=True)
    return examine_text(log, str(logs[0] if logs else path), path, gpu)


def examine_text(
    log: LogText, name: str, folder: Path | None = None, gpu: str | None = None
) -> Finding:
    """Return what is found in the lines of a log; a plan.json in `folder` is of its run."""
    events = events_in(log.lines)
    run_folder, plan = _plan_of(log, folder)
    event = _with_measurement(main_event(events), run_folder, plan)
    if event is not None and not events:
        events = (event,)
    until = event.line if event is not None else len(log.lines)
    run = program_of(log.lines, until, plan)
    if event is None:
        return Finding(log=plain(name), recognised=False, program=run.name)
    patient = patient_of(run, event, gpu) if _is_about_memory(event, run) else None
    mends = (*first_mends(event, run), *_mends(event, run, patient, gpu))
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


def _mends(
    event: Event, run: ProgramRun, patient: Patient | None, gpu: str | None
) -> tuple[Mend, ...]:
    planned = () if patient is None else planned_mends(patient)
    if planned:
        return planned
    mends = general_mends(event, run)
    if not isinstance(event, OutOfMemory):
        return mends
    return (*mends[:1], *in_snugpt(run, event, gpu), *mends[1:])


def _plan_of(log: LogText, folder: Path | None) -> tuple[Path | None, Plan | None]:
    """The folder and plan of a run of snugpt: where it says it writes to, or beside the log."""
    said, named = plan_places(log.lines)
    places = [Path(said) / PLAN_FILE] if said is not None else []
    if folder is not None:
        places += [folder / said / PLAN_FILE] if said is not None else []
        places.append(folder / PLAN_FILE)
    if named is not None:
        places += [Path(named)] + ([folder / named] if folder is not None else [])
    for place in places:
        try:
            if place.is_file():
                return place.parent, read_plan(place)
        except (SnugError, OSError, ValueError):  # damaged, or no path at all
            continue
    return None, None


def _with_measurement(event: Event | None, folder: Path | None, plan: Plan | None) -> Event | None:
    """A run of snugpt that ran out of memory says so in one line, and measures what it held."""
    if folder is None or plan is None:
        return event
    on_cpu = plan.gpu.backend == "cpu"
    if isinstance(event, OutOfMemory) and event.tried_bytes is None:
        event = msgspec.structs.replace(event, backend="cpu" if on_cpu else "cuda")
    elif event is not None:
        return event
    try:
        found = measurement_from_json((folder / MEASUREMENT_FILE).read_bytes())
    except (SnugError, OSError, ValueError):
        return event
    if found.outcome != "oom":
        return event
    allocated, reserved = found.allocated_bytes, found.reserved_bytes
    cached = None if allocated is None or reserved is None else max(0, reserved - allocated)
    return OutOfMemory(
        backend="cpu" if on_cpu else "cuda",
        line=0 if event is None else event.line,
        allocated_bytes=allocated,
        cached_bytes=cached,
        process_bytes=found.process_bytes,
    )


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
    if patient is None and isinstance(event, OutOfMemory):
        notes.append(
            "what says nothing of fitting is not checked: no plan of ours stands for this program"
        )
    if isinstance(event, NotANumber) and run.plan is not None:
        notes.append("its checkpoints from before are kept")
    return notes


def _title(event: Event) -> str:
    return str(type(event).__struct_config__.tag).replace("_", " ")

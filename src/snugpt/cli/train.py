"""`snugpt train`: plan if there is no plan yet, run it, print the receipt."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from snugpt.cli.options import QuestionCommand, question_from, question_options
from snugpt.cli.plan import hint_for, planned
from snugpt.cli.screen import print_plan
from snugpt.errors import BadQuestionError
from snugpt.planner.command import started_by
from snugpt.run.distributed import joined
from snugpt.spec.host import default_cache_folder, default_ledger_folder
from snugpt.spec.plan import Plan, read_plan
from snugpt.spec.question import GENERATION_ONLY, Question

if TYPE_CHECKING:
    from snugpt.run.reports import TrainingResult

LEFT_OUT = ("task", "model", *GENERATION_ONLY)


@click.command(cls=QuestionCommand)
@click.argument("plan_file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--name", "--model-name", "--run", "name", metavar="NAME",
    help="Name of the run under runs/; the same name goes on where it stopped.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The measurement as one JSON object.")
@question_options(leave_out=LEFT_OUT)
def train(plan_file: Path | None, name: str | None, as_json: bool, **flags: Any) -> int:
    """Train by a plan.json, or by flags, which are planned first. A run that exists goes on.

    Ctrl-C and SIGTERM save and say how to go on. The text is --input, or the one built in.

    \b
    Examples:
      snugpt train plan.json
      snugpt train --layers 4 --width 192 --heads 3 --seq-len 256 --num-iterations 200
    """
    given = {field: value for field, value in flags.items() if value is not None}
    if plan_file is not None and given:
        field = next(iter(given))
        raise BadQuestionError(
            f"{field} can't be changed in a plan that is made", hint="snugpt plan --help"
        )
    with joined() as world:
        plan = world.first(lambda: _plan_of(plan_file, flags, name, as_json=as_json))
        if not world.is_first:
            return _train_silently(plan, name)
        return run_training(plan, name, as_json=as_json)


def _plan_of(
    plan_file: Path | None, flags: dict[str, Any], name: str | None, *, as_json: bool
) -> Plan:
    """The plan that is given, or the one that is made here and shown."""
    if plan_file is not None:
        return read_plan(plan_file)
    plan = _planned_to_train(question_from(flags), name)
    if not as_json:
        print_plan(plan)
        click.echo()
    return plan


def _train_silently(plan: Plan, name: str | None) -> int:
    """What the other ranks of a run do: the same, and the first one tells."""
    from snugpt.run.run_folder import folder_for
    from snugpt.run.train import train as train_plan

    result = train_plan(
        plan, folder_for(plan, name), cache_dir=default_cache_folder(),
        ledger_folder=default_ledger_folder(), argv=("snugpt", *sys.argv[1:]),
    )  # fmt: skip
    return _exit_code(result)


def run_training(plan: Plan, name: str | None, *, as_json: bool = False) -> int:
    """Train a plan with its progress on stderr and its receipt on stdout; return the exit code.

    A run that a signal ended exits with 128 + its number, as shells give it: 130 for Ctrl-C.
    """
    from snugpt.cli.training_screen import TrainingScreen, receipt_lines
    from snugpt.run.readiness import runnable
    from snugpt.run.run_folder import folder_for
    from snugpt.run.train import train as train_plan

    folder = folder_for(plan, name)
    runnable(plan, lambda _: None)  # what can't be run is refused before anything is said
    argv = ("snugpt", *sys.argv[1:])
    click.echo(f"run   {folder.path}\nargv  {shlex.join(argv)}", err=True)
    screen = TrainingScreen(plan.memory.capacity_bytes)
    try:
        result = train_plan(
            plan, folder, cache_dir=default_cache_folder(), ledger_folder=default_ledger_folder(),
            argv=argv, watcher=screen,
        )  # fmt: skip
    finally:
        screen.close()
    run = folder.path.name
    started = started_by(getattr(plan.recipe, "world_size", 1))
    if result.interrupted_by is not None and not result.finished:
        click.echo(
            f"{result.interrupted_by}: saved after step {result.steps}; go on with\n"
            f"  {started} train {folder.plan_file} --name {run}",
            err=True,
        )
    measurement = result.measurement
    if measurement is None and result.finished and folder.measurement_file.exists():
        from snugpt.spec.measurement import measurement_from_json

        measurement = measurement_from_json(folder.measurement_file.read_bytes())
    if as_json and measurement is not None:
        import msgspec

        click.echo(msgspec.json.encode(measurement).decode())
    elif measurement is not None:
        for line in receipt_lines(measurement, plan.recipe):
            click.echo(line)
    if result.finished:
        click.echo(f"generate with: snugpt generate {run} --prompt 'The file'", err=True)
    return _exit_code(result)


def _exit_code(result: TrainingResult) -> int:
    if result.interrupted_by is not None and not result.finished:
        return 128 + signal.Signals[result.interrupted_by].value
    return 0


def _planned_to_train(question: Question, name: str | None) -> Plan:
    """The plan of a question; the hint of a refusal trains too."""
    try:
        return planned(_with_text(question))
    except BadQuestionError as error:
        hint = hint_for("train", error.hint)
        if hint is None or hint == error.hint:
            raise
        if name is not None and not hint.endswith(" --help"):
            hint += f" --name {shlex.quote(name)}"
        raise BadQuestionError(error.message, hint=hint) from None


def _with_text(question: Question) -> Question:
    """The question with the built-in text where none is named."""
    if question.input is not None or question.stack != "snugpt":
        return question
    import msgspec

    return msgspec.structs.replace(question, input="builtin")

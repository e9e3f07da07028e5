"""`snugpt trace`: the code that would run, run without a GPU, beside what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from snugpt.cli.options import QuestionCommand, question_from, question_options
from snugpt.cli.output_files import PICTURE_SUFFIX, check_output, write_output
from snugpt.cli.own_model import is_named_model, trace_model
from snugpt.cli.plan import hint_for, planned
from snugpt.cli.screen import colour
from snugpt.errors import BadQuestionError, FailedError
from snugpt.planner.command import command_line
from snugpt.spec.plan import Plan, read_plan
from snugpt.spec.question import Question
from snugpt.spec.recipe import TrainingRecipe

MANY_CHUNKS, S_PER_CHUNK = 2000, 0.003  # of two micro-steps and an evaluation


@click.command(cls=QuestionCommand)
@click.argument("target", required=False)
@click.option(
    "--snapshot", type=click.Path(path_type=Path), metavar="FILE",
    help="Read what torch.cuda.memory._dump_snapshot wrote, and replay it.",
)  # fmt: skip
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.svg",
    help="Draw the step there, predicted and traced one over the other.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The comparison as one JSON object.")
@question_options()
def trace(
    target: str | None, snapshot: Path | None, plot: Path | None, as_json: bool, **flags: Any
) -> None:
    """Run one step's real code without a GPU and set its memory beside the prediction.

    TARGET is a plan.json; without one the flags are planned first. Exit code 1: they differ.

    Or TARGET is package.module:callable. It is called without arguments, or with batch_size= if it
    takes that, and returns a model of your own or (model, batch). Without a batch it is 8 x 1024
    tokens, as labels too where forward names them labels, targets, target or y. --gpu
    --batch-size --seq-len --compute-dtype and --task generate (no training step) go with it. Exit
    code 3: it does not fit.

    \b
    Examples:
      snugpt trace --gpu rtx-4090 --depth 12
      snugpt trace plan.json --plot step.svg
      snugpt trace my_package.model:build --gpu rtx-4090 --seq-len 1024
      snugpt trace --snapshot snapshot.pickle
    """
    given = {field: value for field, value in flags.items() if value is not None}
    if plot is not None:
        hint = "snugpt trace --depth 12 --plot step.svg"
        check_output("plot", plot, hint=hint, suffix=PICTURE_SUFFIX)
    if snapshot is not None:
        _only("snapshot", target, given)
        _trace_snapshot(snapshot, plot, as_json=as_json)
        return
    if target is not None and is_named_model(target):
        trace_model(target, given, plot, as_json=as_json)
        return
    if target is not None and given:
        raise BadQuestionError(
            f"{next(iter(given))} can't be changed in a plan that is made",
            hint="snugpt plan --help",
        )
    plan = _planned_to_trace(flags) if target is None else read_plan(Path(target))
    _trace_plan(plan, plot, as_json=as_json)


def _planned_to_trace(flags: dict[str, Any]) -> Plan:
    """The plan of a question; the hint of a refusal traces too."""
    try:
        return planned(question_from(flags), num_alternatives=0)
    except BadQuestionError as error:
        raise BadQuestionError(error.message, hint=hint_for("trace", error.hint)) from None


def _trace_plan(plan: Plan, plot: Path | None, *, as_json: bool) -> None:
    if plan.stack != "snugpt":
        raise BadQuestionError(
            f"stack = {plan.stack!r} is not traced: its code is not ours",
            hint="snugpt trace --stack snugpt --depth 12",
        )
    from snugpt.tracing.steps import trace as trace_recipe

    _refuse_levers(plan)
    from snugpt.cli import trace_screen
    from snugpt.estimate.comparison import compare
    from snugpt.estimate.memory import batch_of, runtime_of, timeline_of
    from snugpt.planner.machine import default_num_threads
    from snugpt.planner.picturing import picture_of

    runtime = runtime_of(plan.shape, plan.recipe, plan.gpu, default_num_threads())
    if isinstance(plan.recipe, TrainingRecipe):
        _warn_of_chunks(plan.recipe)
    traced = trace_recipe(plan.shape, plan.recipe, runtime)
    predicted = timeline_of(plan.shape, plan.recipe, runtime)
    found = compare(predicted, batch_of(plan.recipe), traced)
    if as_json:
        _print_json(trace_screen.as_json(plan, found))
    else:
        for line in trace_screen.screen(plan, found):
            click.echo(line, color=colour())
    if plot is not None:
        write_output(plot, picture_of(plan, traced).encode())
    if not trace_screen.agrees(found):
        raise FailedError(
            f"predicted {found.peak.predicted:,} and traced {found.peak.measured:,} bytes differ:"
            " a bug in snugpt",
            hint=_traces(plan.question) + " --json",
        )


def _refuse_levers(plan: Plan) -> None:
    """Refuse what needs a real device; the hint is the same question with that taken back."""
    from snugpt.tracing import ranks, steps

    if not isinstance(plan.recipe, TrainingRecipe):
        return
    because, back = "", {}
    if plan.recipe.sharding == "full":
        because, back = ranks.NOT_TRACED, {"sharding": "none"}
    if plan.recipe.compile == "on":
        because, back = steps.NOT_TRACED, {**back, "compile": "off"}
    if because:
        raise BadQuestionError(because, hint=_traces(plan.question, **back))


def _traces(question: Question, **changed: Any) -> str:
    """The command that traces a question."""
    return hint_for("trace", command_line(question, **changed)) or ""


def _warn_of_chunks(recipe: TrainingRecipe) -> None:
    """Say beforehand what takes long: each chunk of the loss is traced by itself."""
    if recipe.chunk_tokens is None:
        return
    number = -(-recipe.micro_batch_tokens // recipe.chunk_tokens)
    if number > MANY_CHUNKS:
        click.echo(
            f"the loss has {number:,} chunks of {recipe.chunk_tokens} tokens, traced one by one:"
            f" about {number * S_PER_CHUNK / 60:.0f} minutes", err=True, color=colour(),
        )  # fmt: skip


def _trace_snapshot(path: Path, plot: Path | None, *, as_json: bool) -> None:
    from snugpt.cli.snapshot_screen import screen
    from snugpt.estimate.picture import draw
    from snugpt.estimate.recorded import timeline_of_snapshot
    from snugpt.estimate.replay import replay
    from snugpt.estimate.snapshot import read_snapshot

    snapshot = read_snapshot(path)
    replayed = replay(snapshot)
    if as_json:
        _print_json(msgspec.to_builtins(replayed))
    else:
        click.echo(screen(replayed, snapshot), color=colour())
    if plot is not None:
        timeline = timeline_of_snapshot(snapshot)
        picture = draw(timeline, 1, title=f"Snapshot {path.name}", source="recorded")
        write_output(plot, picture.encode())


def _only(option: str, target: str | None, given: dict[str, Any]) -> None:
    """Refuse what has no meaning beside `option`."""
    other = target if target is not None else next(iter(given), None)
    if other is not None:
        raise BadQuestionError(
            f"--{option} is read on its own, {other!r} can't be said with it",
            hint=f"snugpt trace --{option} FILE",
        )


def _print_json(value: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())

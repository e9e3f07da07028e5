"""`snugpt trace`: the code that would run, run without a GPU, beside what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from snugpt.cli.options import QuestionCommand, question_from, question_options
from snugpt.cli.output_files import PICTURE_SUFFIX, check_output, write_output
from snugpt.cli.plan import planned
from snugpt.cli.screen import colour
from snugpt.errors import BadQuestionError, DoesNotFitError, FailedError
from snugpt.planner.command import command_line
from snugpt.spec.plan import Plan, read_plan
from snugpt.spec.question import Question
from snugpt.spec.recipe import TrainingRecipe
from snugpt.units import gib

MANY_CHUNKS, S_PER_CHUNK = 2000, 0.003  # of two micro-steps and an evaluation
MODEL_FLAGS = {"gpu", "batch_size", "seq_len", "compute_dtype", "task"}
AUTOCAST = {"bf16": "bf16", "fp32": None}  # of compute_dtype; the card decides where it is not said


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

    Or TARGET is package.module:callable, which builds a model of your own; --gpu --batch-size
    --seq-len and --task generate (no training step) go with it. Exit code 3: it does not fit.

    \b
    Examples:
      snugpt trace --gpu rtx-4090 --depth 12
      snugpt trace plan.json --plot step.svg
      snugpt trace my_package.my_model:build --gpu rtx-4090 --batch-size 8 --seq-len 1024
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
        _trace_model(target, given, plot, as_json=as_json)
        return
    if target is not None and given:
        raise BadQuestionError(
            f"{next(iter(given))} can't be changed in a plan that is made",
            hint="snugpt plan --help",
        )
    plan = planned(question_from(flags), 0) if target is None else read_plan(Path(target))
    _trace_plan(plan, plot, as_json=as_json)


def _trace_plan(plan: Plan, plot: Path | None, *, as_json: bool) -> None:
    if plan.stack != "snugpt":
        raise BadQuestionError(
            f"stack = {plan.stack!r} is not traced: its code is not ours",
            hint="snugpt trace --stack snugpt --depth 12",
        )
    if isinstance(plan.recipe, TrainingRecipe) and plan.recipe.compile == "on":
        raise BadQuestionError(
            "compile = 'on' is not traced: what is compiled runs on its GPU only",
            hint=_traces(plan.question, compile="off"),
        )
    from snugpt.cli import trace_screen
    from snugpt.estimate.comparison import compare
    from snugpt.estimate.memory import batch_of, runtime_of, timeline_of
    from snugpt.planner.machine import default_num_threads
    from snugpt.planner.picturing import picture_of
    from snugpt.tracing.steps import trace as trace_recipe

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


def _traces(question: Question, **changed: Any) -> str:
    """The command that traces a question."""
    return command_line(question, **changed).replace("plan", "trace", 1)


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


def is_named_model(target: str) -> bool:
    """Whether a target is `package.module:callable` and not a path."""
    module, colon, name = target.partition(":")
    return (
        bool(colon)
        and name.isidentifier()
        and all(part.isidentifier() for part in module.split("."))
    )


def _trace_model(target: str, given: dict[str, Any], plot: Path | None, *, as_json: bool) -> None:
    foreign = given.keys() - MODEL_FLAGS
    if foreign:
        field = next(name for name in given if name in foreign)
        raise BadQuestionError(
            f"{field} is not a flag for a model of your own; these are:"
            f" {', '.join(sorted(MODEL_FLAGS))}",
            hint=f"snugpt trace {target} --gpu rtx-4090 --batch-size 8 --seq-len 1024",
        )
    from snugpt.cli.model_screen import screen
    from snugpt.tracing.named_model import trace_named

    traced = trace_named(
        target,
        gpu=given.get("gpu", "h100"),
        batch_size=given.get("batch_size"),
        seq_len=given.get("seq_len"),
        dtype=AUTOCAST.get(given.get("compute_dtype", ""), "auto"),
        train=given.get("task", "train") == "train",
    )
    if as_json:
        _print_json(traced.to_dict())
    else:
        for line in screen(traced):
            click.echo(line, color=colour())
    if plot is not None:
        from snugpt.estimate.picture import draw

        picture = draw(
            traced.timeline, 1, title=f"{target}, batch {traced.batch_size}, on {traced.gpu.name}",
            source="traced", capacity_bytes=traced.capacity_bytes,
            process_bytes=traced.process_bytes,
        )  # fmt: skip
        write_output(plot, picture.encode())
    if not traced.fits:
        raise DoesNotFitError(
            f"does not fit on {traced.gpu.name}: process up to"
            f" {gib(traced.process_bytes.high)} of {gib(traced.capacity_bytes)}",
            hint=_again(target, given | {"batch_size": traced.largest_batch() or 1}),
        )


def _again(target: str, given: dict[str, Any]) -> str:
    flags = (f"--{name.replace('_', '-')} {value}" for name, value in given.items())
    return " ".join(("snugpt trace", target, *flags))


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

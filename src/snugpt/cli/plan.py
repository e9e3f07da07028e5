"""`snugpt plan`: what fits, how fast, which settings and why."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from snugpt.cli.options import QuestionCommand, question_from, question_options
from snugpt.cli.output_files import PICTURE_SUFFIX, check_output, write_output
from snugpt.cli.screen import print_plan
from snugpt.errors import BadQuestionError, DoesNotFitError, bad_value
from snugpt.planner.answer import MOST_ALTERNATIVES, answer
from snugpt.planner.command import command_line
from snugpt.planner.horizon import CorpusSize
from snugpt.planner.machine import CPU_ID, machine_for
from snugpt.spec.host import default_cache_folder
from snugpt.spec.plan import Plan, encode_plan
from snugpt.spec.question import Question
from snugpt.spec.recipe import TrainingRecipe
from snugpt.units import gib, gib_of


@click.command(cls=QuestionCommand)
@click.option("--json", "as_json", is_flag=True, help="The whole plan, one JSON object on stdout.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write the plan there, for `snugpt train FILE`.",
)  # fmt: skip
@click.option(
    "--plot", type=click.Path(path_type=Path), metavar="FILE.svg",
    help="Draw the step there: bytes by category, phase by phase, against the card.",
)  # fmt: skip
@click.option(
    "--measure", is_flag=True,
    help="Train on this processor for ten seconds first, so that times are not guessed.",
)  # fmt: skip
@question_options()
def plan(
    as_json: bool, output: Path | None, plot: Path | None, measure: bool, **flags: Any
) -> None:
    """Say what fits: settings, memory, speed, and why. No GPU and no torch is needed.

    What you pin stays; what you leave out is chosen. Exit code 3: it does not fit.

    \b
    Examples:
      snugpt plan --gpu rtx-4090 --depth 12
      snugpt plan --gpu gtx-1070 --task generate --preset 150M
    """
    _check_outputs(output, plot)
    question = question_from(flags)
    if measure:
        _measure_this_processor(question)
    whole = as_json or output is not None
    made = planned(question, num_alternatives=MOST_ALTERNATIVES if whole else 0)
    if as_json:
        sys.stdout.write(encode_plan(made).decode())
    else:
        print_plan(made)
    if plot is not None:
        from snugpt.planner.picturing import picture_of

        write_output(plot, picture_of(made).encode())
    if not made.fits:
        raise does_not_fit(made)
    if output is not None:
        write_output(output, encode_plan(made))


def _measure_this_processor(question: Question) -> None:
    """Train for ten seconds here, where the plan is for here.

    Raises:
        BadQuestionError: it is for a card, whose speed this says nothing of.
    """
    found = machine_for(question.gpu).gpu
    if found.id != CPU_ID:
        raise BadQuestionError(
            f"--measure is not allowed: it measures this processor, not {found.name}",
            hint=command_line(question),
        )
    from snugpt.run.machine_speed import keep_cpu_rate, measure_cpu_rate

    keep_cpu_rate(default_cache_folder(), measure_cpu_rate())


def _check_outputs(output: Path | None, plot: Path | None) -> None:
    if output is not None:
        check_output("output", output, hint="snugpt plan --depth 12 -o plan.json")
    if plot is not None:
        hint = "snugpt plan --depth 12 --plot plan.svg"
        check_output("plot", plot, hint=hint, suffix=PICTURE_SUFFIX)
        if output is not None and output.resolve() == plot.resolve():
            raise bad_value("plot", str(plot), "another file than the plan's", hint=hint)


def planned(question: Question, num_alternatives: int = MOST_ALTERNATIVES) -> Plan:
    """Return the plan of a question, its text measured if it names one.

    The screen shows one alternative, a plan on disk has more.

    Raises:
        BadQuestionError: the question or its text won't do.
    """
    if question.input is None or question.task == "generate":
        return answer(question, num_alternatives=num_alternatives)
    from snugpt.data.corpus import measure_corpus

    measured = measure_corpus(question.input, default_cache_folder())
    size = CorpusSize(num_bytes=measured.num_bytes, num_characters=measured.num_characters)
    made = answer(question, corpus=size, num_alternatives=num_alternatives)
    assert isinstance(made.recipe, TrainingRecipe)
    if measured.num_bytes <= made.recipe.seq_len:  # a token is a byte at least
        raise BadQuestionError(
            f"input = {question.input!r} has {measured.num_bytes} bytes, one row takes"
            f" {made.recipe.seq_len + 1} tokens",
            hint=command_line(question, input="builtin"),
        )
    return made


def hint_for(verb: str, hint: str | None) -> str | None:
    """A planner's hint as a command of another verb that takes the same flags."""
    start = "snugpt plan --"
    if hint is None or not hint.startswith(start):
        return hint
    return f"snugpt {verb} --{hint.removeprefix(start)}"


def does_not_fit(made: Plan) -> DoesNotFitError:
    """The error of a plan that does not fit; its hint is the nearest one that does."""
    memory = made.memory
    largest, size = next(iter(memory.categories.items()))
    return DoesNotFitError(
        f"does not fit on {made.gpu.name}: process up to"
        f" {gib_of(memory.process_bytes.high, memory.capacity_bytes)}; peak in"
        f" {memory.peak_phase}, largest: {largest} {gib(size)}",
        hint=made.alternatives[0].command if made.alternatives else "snugpt gpus",
    )

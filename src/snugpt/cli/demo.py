"""`snugpt demo`: the whole story in three minutes, without a GPU and without a download."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import msgspec

from snugpt.cli.plan import planned
from snugpt.cli.screen import print_plan
from snugpt.cli.train import run_training
from snugpt.planner.machine import CPU_ID, measured_rates
from snugpt.spec.host import default_cache_folder
from snugpt.spec.plan import Plan
from snugpt.spec.question import Question
from snugpt.spec.recipe import TrainingRecipe
from snugpt.units import duration, gib

CARDS = ("rtx-3060", "rtx-4090", "h100-80gb")
QUESTION = Question(
    input="builtin", layers=4, width=192, heads=3, seq_len=256,
    total_batch_tokens=2048, total_tokens=244 * 2048,
)  # fmt: skip
PROMPTS = ("The file", "Return a", "If the")
NEW_TOKENS = 60
MEASURED_TOKENS = 200  # of each of eight texts, for the share of known words
WORD = re.compile(r"[a-z]{4,}")
RATE_SECONDS = 10.0


@click.command()
@click.option("--steps", type=click.IntRange(1, 100_000), help="Fewer or more training steps.")
@click.option("--name", help="Name of the run under runs/; default: demo, demo-2, ...")
def demo(steps: int | None, name: str | None) -> int:
    """Plan for this machine, train a small GPT on real English, generate, print the receipt.

    The text is the documentation that came with Python, so nothing is downloaded. Three minutes on
    two cores.

    \b
    Example: snugpt demo
    """
    import torch

    from snugpt.run.run_folder import folder_for

    began = time.monotonic()
    question = QUESTION
    if steps is not None:
        tokens = steps * (QUESTION.total_batch_tokens or 0)
        question = msgspec.structs.replace(QUESTION, total_tokens=tokens)
    run = _free_name(Path("runs")) if name is None else name
    folder_for(planned(question, num_alternatives=0), run)  # refuses a name before time is spent
    if CPU_ID not in measured_rates() and not torch.cuda.is_available():
        _measure_this_machine()
    _title("1  A plan for this machine")
    plan = planned(question, num_alternatives=0)
    print_plan(plan)
    _title("2  The same model on three cards")
    for line in card_table(question):
        click.echo(line)
    _title("3  Training on Python's own documentation")
    interrupted = run_training(plan, run)
    if interrupted:
        return interrupted
    _title("4  What it writes")
    _show_texts(run, plan)
    _title(f"Done in {duration(time.monotonic() - began)}. Now yours:")
    click.echo("  snugpt plan --gpu rtx-4090 --depth 12      what fits your card")
    click.echo(f"  snugpt generate {run} --prompt 'The file'   more of this model")
    click.echo("  snugpt train --input my-texts/ --hours 1   train on your own text")
    click.echo("  snugpt records                             predicted ÷ measured so far")
    return 0


def card_table(question: Question) -> Iterator[str]:
    """The question's plan on each of the named cards, one line a card."""
    yield (
        f"{'card':<12}{'process':>10}{'of':>10}{'batch':>7}{'passes':>8}{'tokens/s':>11}{'time':>10}"
    )
    for card in CARDS:
        plan = planned(msgspec.structs.replace(question, gpu=card), num_alternatives=0)
        recipe, memory, speed = plan.recipe, plan.memory, plan.speed
        assert isinstance(recipe, TrainingRecipe)
        yield (
            f"{card:<12}{gib(memory.process_bytes.expected):>10}{gib(memory.capacity_bytes):>10}"
            f"{recipe.device_batch_size:>7}{recipe.grad_accum_steps:>8}"
            f"{speed.tokens_per_s.expected:>11,.0f}{duration(speed.hours * 3600):>10}"
        )
    yield "predicted; there is no record from a GPU yet"


def one_line(prompt: str, text: str) -> str:
    """The text that follows a prompt, its line breaks and indents made single spaces."""
    return " ".join((prompt + text).split())[len(prompt) :]


def known_share(texts: Iterable[str], known: set[str]) -> float:
    """The share of words of four letters and more that are among the known ones."""
    words = [word for text in texts for word in WORD.findall(text.lower())]
    return sum(word in known for word in words) / max(1, len(words))


def _measure_this_machine() -> None:
    """Train on random tokens for ten seconds, once per machine, so that times are not guessed."""
    from snugpt.run.machine_speed import keep_cpu_rate, measure_cpu_rate

    click.echo(f"measuring how fast this machine trains ({RATE_SECONDS:.0f} s, once)", err=True)
    keep_cpu_rate(default_cache_folder(), measure_cpu_rate(RATE_SECONDS))


def _show_texts(run: str, plan: Plan) -> None:
    from snugpt.data.corpus import read_corpus
    from snugpt.model.sampling import Sampling
    from snugpt.run.generate import load_model, sample_texts
    from snugpt.run.run_folder import find_run

    trained = load_model(find_run(run))
    sampling = Sampling(temperature=0.7)
    for prompt in PROMPTS:
        (text,) = sample_texts(
            trained, prompt, max_new_tokens=NEW_TOKENS, sampling=sampling, count=1
        )
        click.echo(click.style(prompt, bold=True) + one_line(prompt, text))
        click.echo()
    room = plan.shape.context_len - 8
    texts = sample_texts(
        trained, PROMPTS[0], max_new_tokens=min(MEASURED_TOKENS, room),
        sampling=sampling, count=8,
    )  # fmt: skip
    corpus = read_corpus(plan.question.input or "builtin", default_cache_folder())
    known = {word for document in corpus.documents() for word in WORD.findall(document.lower())}
    share = known_share(texts, known)
    click.echo(f"{share:.0%} of its words of four letters and more are words of the text")


def _free_name(runs: Path) -> str:
    """demo, or the first demo-2, demo-3, ... that is not there yet."""
    number = 1
    while (runs / _numbered(number)).exists():
        number += 1
    return _numbered(number)


def _numbered(number: int) -> str:
    return "demo" if number == 1 else f"demo-{number}"


def _title(text: str) -> None:
    click.echo("\n" + click.style(text, bold=True) + "\n")

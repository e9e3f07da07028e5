"""`snugpt generate`: text from a trained model, as it comes."""

from __future__ import annotations

import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click

from snugpt.errors import BadQuestionError
from snugpt.units import gib


@click.command()
@click.argument("name")
@click.option("--prompt", default="", help="Text to continue; - reads standard input.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Tokens at most.")
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the likeliest.")
@click.option(
    "--top-k", type=int, default=50, show_default=True, help="Of the k likeliest; 0: all."
)
@click.option("--top-p", type=float, help="Of the likeliest that reach this probability together.")
@click.option("--seed", default=1337, show_default=True, help="The same seed, the same text.")
@click.option("--num-samples", default=1, show_default=True, help="Texts drawn together.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per text on stdout.")
def generate(
    name: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float | None,
    seed: int,
    num_samples: int,
    as_json: bool,
) -> None:
    """Continue a prompt with a model that was trained here: its name under runs/, or a path.

    \b
    Example: snugpt generate demo --prompt "The file"
    """
    from snugpt.model.sampling import Sampling
    from snugpt.run.generate import load_model, sample_texts, text_stream
    from snugpt.run.run_folder import find_run

    if not 1 <= num_samples <= 4096:
        raise BadQuestionError(
            f"num_samples = {num_samples} is not allowed: 1 to 4096",
            hint=f"snugpt generate {name} --num-samples 4",
        )
    try:
        sampling = Sampling(temperature=temperature, top_k=top_k or None, top_p=top_p, seed=seed)
    except BadQuestionError as error:
        hint = f"snugpt generate {shlex.quote(name)}"
        raise BadQuestionError(error.message, hint=hint) from None
    folder = find_run(name)
    if prompt == "-":
        prompt = sys.stdin.read()
    with _one_line_warnings():
        trained = load_model(folder)
    began = time.perf_counter()
    if num_samples == 1 and not as_json:
        pieces = text_stream(trained, prompt, max_new_tokens=max_new_tokens, sampling=sampling)
        first = next(pieces, "")  # what can be refused is refused here, before anything is printed
        click.echo(prompt + first, nl=False)
        for text in pieces:
            click.echo(text, nl=False)  # which flushes
        click.echo()
    else:
        texts = sample_texts(
            trained, prompt, max_new_tokens=max_new_tokens, sampling=sampling, count=num_samples
        )
        _print_samples(texts, prompt, as_json=as_json)
    if sys.stderr.isatty():
        from snugpt.run.memory_watch import memory_report

        report = memory_report()
        spent = f"{time.perf_counter() - began:.1f} s"
        process = gib(report.process_bytes) if report.process_bytes is not None else "unknown"
        click.echo(f"({spent}, process {process})", err=True)


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show what Python warns of as one line without its place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: click.echo(f"warning: {message}", err=True)
        yield


def _print_samples(texts: list[str], prompt: str, *, as_json: bool) -> None:
    import msgspec

    for number, text in enumerate(texts, 1):
        if as_json:
            line = {"prompt": prompt, "text": text, "sample": number}
            click.echo(msgspec.json.encode(line).decode())
        else:
            click.echo(f"--- {number}\n{prompt}{text}")

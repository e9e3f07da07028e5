"""`snugpt trace package.module:callable`: a model of one's own, traced for a card.

What the user's code prints goes to stderr, so that stdout holds the answer alone. What it writes
past Python (os.system, a C library) can't be moved and stays where it goes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click
import msgspec

from snugpt.cli.output_files import write_output
from snugpt.cli.screen import colour
from snugpt.errors import BadQuestionError, DoesNotFitError, SnugError
from snugpt.units import gib_of

MODEL_FLAGS = {"gpu", "batch_size", "seq_len", "compute_dtype", "task"}
AUTOCAST = {
    "bf16": "bf16",
    "fp16": "fp16",
    "fp32": None,
}  # of compute_dtype; the card decides where it is not said
HELP = "snugpt trace --help"
SHORTER = (4, 16)  # the parts of a sequence that are tried where not one of it fits


def is_named_model(target: str) -> bool:
    """Whether a target is `package.module:callable` and not the path of a plan.

    Raises:
        BadQuestionError: it is neither.
    """
    file = Path(target.partition(":")[0])
    if _is_dotted(target) and not file.is_file():
        return True
    if Path(target).suffix != ".json" and not os.path.exists(target):
        raise BadQuestionError(
            f"TARGET {target!r} is neither a plan.json nor package.module:callable",
            hint=_dotted(target),
        )
    return False


def _dotted(target: str) -> str:
    """The command for `folder/model.py:build` below the current folder, else the help."""
    path, _, name = target.rpartition(":")
    below = Path(path).with_suffix("") if Path(path).suffix == ".py" else Path()
    if below.is_absolute() and below.is_relative_to(Path.cwd()):
        below = below.relative_to(Path.cwd())
    dotted = f"{'.'.join(below.parts)}:{name}"
    return f"snugpt trace {dotted}" if _is_dotted(dotted) else HELP


def _is_dotted(target: str) -> bool:
    module, _, name = target.partition(":")
    return name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def trace_model(target: str, given: dict[str, Any], plot: Path | None, *, as_json: bool) -> None:
    """Trace, print the screen or JSON, draw; `given` are the flags that were said."""
    foreign = [name for name in given if name not in MODEL_FLAGS]
    if foreign:
        raise BadQuestionError(
            f"{foreign[0]} is not a flag for a model of your own; these are:"
            f" {', '.join(sorted(MODEL_FLAGS))}",
            hint=_again(target, given, dict.fromkeys(foreign)),
        )
    from snugpt.cli.model_screen import screen

    with redirect_stdout(sys.stderr):  # every trace runs the user's code, the largest batch's too
        try:
            traced = _traced(target, given)
        except SnugError as error:
            error.hint = _hint(target, given, error.hint)
            raise
        if as_json:
            said = msgspec.json.format(msgspec.json.encode(traced.to_dict()), indent=2).decode()
        else:
            said = "\n".join(screen(traced))
        smaller = None if traced.fits else _smaller(target, given, traced)
    click.echo(said, color=colour())
    if plot is not None:
        from snugpt.estimate.picture import draw

        picture = draw(
            traced.timeline, 1, title=f"{target}, batch {traced.batch_size}, on {traced.gpu.name}",
            source="traced", capacity_bytes=traced.capacity_bytes,
            process_bytes=traced.process_bytes,
        )  # fmt: skip
        write_output(plot, picture.encode())
    if smaller is not None:
        raise DoesNotFitError(
            f"does not fit on {traced.gpu.name}: process up to"
            f" {gib_of(traced.process_bytes.high, traced.capacity_bytes)}",
            hint=smaller,
        )


def _traced(target: str, given: Mapping[str, Any]):
    from snugpt.tracing.named_model import trace_named

    return trace_named(
        target,
        gpu=given.get("gpu"),
        batch_size=given.get("batch_size"),
        seq_len=given.get("seq_len"),
        dtype=AUTOCAST.get(given.get("compute_dtype", ""), "auto"),
        train=given.get("task", "train") == "train",
    )


def _smaller(target: str, given: Mapping[str, Any], traced) -> str:
    """A command that fits: the largest batch, else a shorter sequence, else the other cards."""
    try:
        largest = traced.largest_batch()
        if largest:
            return _again(target, given, {"batch_size": largest})
        for part in SHORTER:
            if traced.seq_len is not None and traced.seq_len >= part:
                changes = {"batch_size": 1, "seq_len": traced.seq_len // part}
                if _traced(target, {**given, **changes}).fits:
                    return _again(target, given, changes)
    except SnugError:  # the model can't run at other sizes
        pass
    return "snugpt gpus"


def _hint(target: str, given: Mapping[str, Any], hint: str | None) -> str | None:
    """A hint for Python as a command, where the command line has it."""
    from snugpt.tracing.refusals import Remedy

    if isinstance(hint, Remedy) and hint.flags:
        changes = dict(hint.flags)
        return _again(changes.pop("target", None) or target, given, changes)
    return HELP if hint is None or hint.startswith("snugpt.trace(") else hint


def _again(target: str, given: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """The same command with some flags changed; None drops one."""
    flags = (
        f"--{name.replace('_', '-')} {value}"
        for name, value in {**given, **changes}.items()
        if value is not None
    )
    return " ".join(("snugpt trace", target, *flags))

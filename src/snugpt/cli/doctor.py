"""`snugpt doctor`: what went wrong in a run, from its log; without one, what this machine lacks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from snugpt.errors import BadQuestionError

STANDARD_INPUT = "-"
LARGE_BYTES = 1 << 28  # from here on reading takes longer than a person waits without a word


@click.command()
@click.argument("log", required=False, metavar="[LOG]")
@click.option("--gpu", metavar="CARD", help="The card it ran on, where the log does not say.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor(log: str | None, gpu: str | None, as_json: bool) -> int:
    """Say what happened in LOG, what held the memory, and what mends it, with new commands.

    LOG is the output of a run of snugpt, nanochat, nanoGPT or any PyTorch program, the folder of a
    run, or - for standard input. A mend is checked by planning it where the log says what ran.
    Without LOG: driver, card, who holds its memory, PyTorch, disk and RAM of this machine.
    Exit code 1: nothing in the log is recognised.

    \b
    Examples:
      snugpt doctor
      snugpt doctor run.log
      snugpt doctor run.log --gpu rtx-4090
    """
    if log is None:
        if gpu is not None:
            raise BadQuestionError("--gpu is for a log", hint="snugpt doctor run.log --gpu t4")
        return _check_machine(as_json)
    return _read(log, gpu, as_json)


def _read(log: str, gpu: str | None, as_json: bool) -> int:
    from snugpt.planner.doctor.examine import examine, examine_text
    from snugpt.planner.doctor.reading import read_stream

    if log == STANDARD_INPUT:
        finding = examine_text(read_stream(sys.stdin.buffer), "standard input", Path(), gpu)
    else:
        finding = examine(Path(log), gpu, _share_read if sys.stderr.isatty() else _say_nothing)
    if as_json:
        _print_json(finding)
    else:
        from snugpt.cli.doctor_screen import print_finding

        print_finding(finding)
    return 0 if finding.recognised else 1


def _check_machine(as_json: bool) -> int:
    from snugpt.planner.doctor.machine_checks import check_machine

    report = check_machine()
    if as_json:
        _print_json(report)
    else:
        from snugpt.cli.doctor_screen import print_machine

        print_machine(report)
    return 0


def _print_json(value: Any) -> None:
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    sys.stdout.write(text + "\n")


def _share_read(share: float) -> None:
    """Show on a terminal how far a large log is read; the line is gone at the end."""
    end = "\r\x1b[K" if share >= 1 else ""
    click.echo(end or f"\rreading {share:.0%}", nl=False, err=True)


def _say_nothing(share: float) -> None:
    """Where nobody watches."""

"""A finding on one screen of 80 columns: three lines, the mends with their commands, the notes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from snugpt.cli.screen import COLUMNS, LABEL, colour, row
from snugpt.planner.doctor.examine import Finding
from snugpt.planner.doctor.machine_checks import MachineReport, Status
from snugpt.planner.doctor.mends import Mend
from snugpt.units import gib

KINDS = {
    "exact": "",
    "inexact": "changes the arithmetic",
    "model": "another model",
    "machine": "another card",
    "program": "another program",
}
MARKS: dict[Status, str] = {"ok": "", "warning": "warning: ", "missing": "missing: "}
STYLES: dict[Status, dict[str, Any]] = {
    "ok": {},
    "warning": {"fg": "yellow", "bold": True},
    "missing": {"fg": "red", "bold": True},
}
NOTHING = (
    "no failure is recognised in it. Known are out of memory (CUDA, ROCm, Apple, CPU), a killed"
    " process, a second backward, NaN losses, NCCL time-outs, missing kernels"
)


def print_finding(finding: Finding) -> None:
    """Print what was found in a log on stdout."""
    for line in finding_lines(finding):
        click.echo(line, color=colour())


def finding_lines(finding: Finding) -> Iterator[str]:
    """Yield the lines of the screen; only a command can be longer than 79 columns."""
    yield from row("log", f"{finding.log}, {_program(finding.program)}")
    if not finding.recognised:
        yield from row("what", NOTHING)
        yield from row("next", "the lines around the error, with python's traceback, are needed:")
        yield " " * LABEL + "python train.py 2>&1 | tee run.log"
        return
    yield from row("what", finding.happened)
    yield from row("held", finding.held)
    yield from row("why", finding.why)
    yield ""
    for number, mend in enumerate(finding.mends, 1):
        yield from _mend(number, mend)
    for note in finding.notes:
        yield from row("note", note)
    if finding.also:
        yield from row("also", "in the log: " + ", ".join(finding.also))


def _program(name: str) -> str:
    return {"other": "some PyTorch program", "nanogpt": "nanoGPT"}.get(name, name)


def _mend(number: int, mend: Mend) -> Iterator[str]:
    said = [mend.change]
    if KINDS[mend.kind]:
        said.append(KINDS[mend.kind])
    verdict = _verdict(mend)
    yield from row(f"mend {number}", ", ".join(said) + (f": {verdict}" if verdict else ""))
    if mend.command is not None:
        yield from _command(mend.command)


def print_machine(report: MachineReport) -> None:
    """Print the checks of a machine on stdout."""
    for line in machine_lines(report):
        click.echo(line, color=colour())


def machine_lines(report: MachineReport) -> Iterator[str]:
    """Yield a row for each check, what is wrong marked in words and in colour."""
    for check in report.checks:
        mark = MARKS[check.status]
        lines = list(row(check.name, f"{mark}{check.text}"))
        if mark:
            word = mark.split()[0]
            lines[0] = lines[0].replace(word, click.style(word, **STYLES[check.status]), 1)
        yield from lines
        if check.hint is not None:
            yield from row("", f"hint: {check.hint}")
    wrong = sum(check.status != "ok" for check in report.checks)
    yield ""
    next_ = "snugpt plan" if not wrong else "mend what is marked, then snugpt plan"
    yield from row("next", f"{next_}; of a run that failed: snugpt doctor run.log")


def _verdict(mend: Mend) -> str:
    parts = []
    if mend.saves_bytes:
        parts.append(f"{gib(mend.saves_bytes)} less")
    if mend.time_factor is not None and abs(mend.time_factor - 1) >= 0.01:
        parts.append(f"{mend.time_factor:.2f} x the time")
    if mend.process_bytes is not None:
        verdict = "fits" if mend.fits else "still does not fit"
        parts.append(f"predicted up to {gib(mend.process_bytes)}, {verdict}")
    return "; ".join(parts)


def _command(command: str) -> Iterator[str]:
    """A command that can be copied: its words on lines that end in a backslash."""
    line = " " * LABEL
    for part in _parts(command):
        if len(line) > LABEL + 2 and len(line) + len(part) + 2 > COLUMNS:
            yield line.rstrip() + " \\"
            line = " " * (LABEL + 2)
        line += part + " "
    yield line.rstrip()


def _parts(command: str) -> list[str]:
    """What must stay on one line: a word, or a flag with its value."""
    parts: list[str] = []
    flag = False
    for word in _quoted_words(command):
        if flag and not word.startswith("-"):
            parts[-1] += " " + word
        else:
            parts.append(word)
        flag = word.startswith("-") and "=" not in word and word != "--"
    return parts


def _quoted_words(command: str) -> Iterator[str]:
    """The words of a command as they stand there, none cut inside its quotes."""
    word, quote = "", ""
    for character in command:
        if character == " " and not quote:
            yield word
            word = ""
            continue
        if character in "'\"":
            quote = "" if quote == character else quote or character
        word += character
    yield word

"""Predicted beside traced on one screen of 80 columns: phases, terms, and where they part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import msgspec

from snugpt.cli.screen import COLUMNS, row
from snugpt.estimate.comparison import Comparison, Pair, Parting, Step
from snugpt.planner.picturing import title_of
from snugpt.spec.plan import Plan
from snugpt.units import gib

NAME, FIGURE, RATIO = 26, 12, 9
SHOWN_TERMS = 12
LARGEST_ERROR = 0.001  # of the peak and of every phase; more is a bug


def agrees(found: Comparison) -> bool:
    """Whether peak and phases are within a thousandth."""
    pairs = (found.peak, *found.phases.values())
    return all(abs(pair.ratio - 1) <= LARGEST_ERROR for pair in pairs)


def screen(plan: Plan, found: Comparison) -> Iterator[str]:
    """Yield the lines of the screen, each at most 79 columns wide."""
    verdict = "AGREE" if agrees(found) else "DIFFER"
    lines = _wrapped(title_of(plan), COLUMNS - len(verdict) - 2)
    mark = click.style(verdict, fg="green" if agrees(found) else "red", bold=True)
    yield lines[0].ljust(COLUMNS - len(verdict)) + mark
    yield from lines[1:]
    yield ""
    yield _cells("requested bytes", "predicted", "traced", "ratio")
    yield from (_line(f"  {phase}", pair) for phase, pair in found.phases.items())
    yield _line(f"peak, in {found.predicted_phase}", found.peak)
    yield ""
    yield from _by_name(found) if found.parting is None else _by_category(found)
    yield ""
    yield from row("apart", _apart(found))
    yield from row("traced", "the code that runs, on PyTorch's meta device: no GPU, no memory")


def _by_name(found: Comparison) -> Iterator[str]:
    yield _cells("alive at the peak", "predicted", "traced", "ratio") + "  made in"
    for term in found.terms[:SHOWN_TERMS]:
        yield _line(f"  {term.name}", term.bytes) + f"  {_place(term.made_in)}".rstrip()
    rest = found.terms[SHOWN_TERMS:]
    if rest:
        sums = Pair(sum(t.bytes.predicted for t in rest), sum(t.bytes.measured for t in rest))
        yield _line(f"  {len(rest)} smaller", sums)


def _by_category(found: Comparison) -> Iterator[str]:
    """Behind the point where the two part a traced tensor has no predicted name."""
    yield _cells("alive at the peak", "predicted", "traced", "ratio")
    yield from (_line(f"  {kind}", pair) for kind, pair in found.categories.items())


def as_json(plan: Plan, found: Comparison) -> dict[str, Any]:
    """The comparison as JSON values: bytes of both sides by phase and by term."""

    def pair(of: Pair) -> dict[str, int]:
        return {"predicted_bytes": of.predicted, "traced_bytes": of.measured}

    parting = None if found.parting is None else msgspec.to_builtins(found.parting)
    return {
        "agrees": agrees(found),
        "command": plan.command,
        "peak_phase": found.predicted_phase,
        "peak": pair(found.peak),
        "phases": {phase: pair(of) for phase, of in found.phases.items()},
        "categories": {kind: pair(of) for kind, of in found.categories.items()},
        "terms": [
            {"name": term.name, **pair(term.bytes), "made_in": term.made_in or None}
            for term in found.terms
        ],
        "num_events": found.num_events,
        "parting": parting,
    }


def _apart(found: Comparison) -> str:
    if found.parting is None:
        short = f"; {', '.join(found.in_short)} are predicted in short" if found.in_short else ""
        return (
            f"nowhere: {found.num_events:,} events come in the same order on both sides, those up"
            f" to 512 bytes left out{short}"
        )
    return f"first in {found.parting.phase}, event {found.parting.index}: {_sides(found.parting)}"


def _sides(parting: Parting) -> str:
    def said(step: Step | None) -> str:
        if step is None:
            return "nothing"
        verb = "allocates" if step.bytes > 0 else "frees"
        return f"{verb} {abs(step.bytes):,} bytes, {step.name}"

    return f"predicted {said(parting.predicted)}; traced {said(parting.measured)}"


def _line(name: str, pair: Pair) -> str:
    return _cells(name, gib(pair.predicted), gib(pair.measured), f"{pair.ratio:.4f}")


def _cells(name: str, predicted: str, traced: str, ratio: str) -> str:
    return f"{name[:NAME]:<{NAME}}{predicted:>{FIGURE}}{traced:>{FIGURE}}{ratio:>{RATIO}}"


def _place(made_in: str) -> str:
    """The line alone: the function before it does not fit."""
    return made_in.rpartition(" ")[2]


def _wrapped(text: str, columns: int) -> list[str]:
    if len(text) <= columns:
        return [text]
    cut = text.rfind(", ", 0, columns)
    cut = columns if cut < 0 else cut
    return [text[:cut], text[cut:].lstrip(", ")]

"""What a run shows: progress on stderr while it trains, the receipt on stdout at its end."""

from __future__ import annotations

import math
import shutil
import sys
import time

import click

from snugpt.run.reports import EvaluationReport, Notice, Report, StepReport
from snugpt.spec.measurement import COUNTERS, Measurement
from snugpt.spec.recipe import Recipe, TrainingRecipe
from snugpt.units import duration, gib, plural

LINE_EVERY_S = 10.0  # where the terminal can't be written over
GAP = "  "  # between the parts of a line


class TrainingScreen:
    """Shows reports: one line that is written over on a terminal, now and then a line elsewhere."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.live = sys.stderr.isatty()
        self._open_line = False
        self._shown_s = -math.inf
        self._stage = ""

    def __call__(self, report: Report) -> None:
        """Show one report."""
        if isinstance(report, StepReport):
            self._step(report)
        elif isinstance(report, EvaluationReport):
            self._whole(f"step {report.step:>6}  validation {report.bits_per_byte:.4f} bits/byte")
        else:
            self._notice(report)

    def close(self) -> None:
        """End a line that is still being written over."""
        if self._open_line:
            click.echo("", err=True)
            self._open_line = False

    def _step(self, report: StepReport) -> None:
        parts = [f"step {report.step:>6}/{report.num_steps}", f"loss {report.loss:.3f}"]
        if math.isfinite(report.seconds_left):
            parts.append(f"{duration(report.seconds_left)} left")
        if report.tokens_per_s:
            parts.append(f"{report.tokens_per_s:,.0f} tok/s")
        if report.allocated_bytes is not None:
            share = report.allocated_bytes / max(1, self.capacity_bytes)
            parts.append(f"peak {gib(report.allocated_bytes)} ({share:.0%})")
        if report.mfu is not None:
            parts.append(f"MFU {report.mfu:.0%}")
        self._over(parts, last=report.step == report.num_steps)

    def _notice(self, notice: Notice) -> None:
        stage, _, share = notice.text.rpartition(" ")
        if not share.endswith("%"):
            self._whole(notice.text)
        elif self.live or stage != self._stage:
            self._stage = stage
            self._over([notice.text if self.live else stage], last=not self.live)

    def _over(self, parts: list[str], *, last: bool = False) -> None:
        """Show a line that the next one may replace; what is too much for a terminal is left out.

        A line that wraps could not be written over.
        """
        now_s = time.monotonic()
        if self.live:
            room = shutil.get_terminal_size().columns - 1
            while len(parts) > 1 and len(GAP.join(parts)) > room:
                parts = parts[:-1]
            click.echo(f"\r\x1b[K{GAP.join(parts)[:room]}", nl=False, err=True)
            self._open_line = True
        elif last or now_s - self._shown_s >= LINE_EVERY_S:
            click.echo(GAP.join(parts), err=True)
            self._shown_s = now_s

    def _whole(self, line: str) -> None:
        if self._open_line:
            click.echo("\r\x1b[K", nl=False, err=True)
            self._open_line = False
        click.echo(line, err=True)


def receipt_lines(measurement: Measurement, planned: Recipe | None = None) -> list[str]:
    """The receipt: predicted beside measured for every counter, and what counted it.

    Where steps were taken again it says so; `planned` is the recipe that the run began with.
    """
    lines = [f"{'peak memory':<12}{'predicted':>12}{'measured':>12}{'ratio':>8}   counted by"]
    for counter in COUNTERS:
        measured, ratio = measurement.measured_bytes(counter), measurement.ratio(counter)
        predicted = measurement.predicted_bytes(counter)
        if measured is None or predicted is None or ratio is None:
            continue
        source = measurement.counters.get(counter, "")
        lines.append(
            f"{counter:<12}{gib(predicted):>12}{gib(measured):>12}{ratio:>8.4f}   {source}"
        )
    if measurement.tokens_per_s:
        speed = f"{measurement.tokens_per_s:,.0f} tokens/s"
        quality = measurement.bits_per_byte
        lines.append(speed + (f", {quality:.4f} bits per byte" if quality is not None else ""))
    if measurement.retries:
        lines.append(_retries_line(measurement.retries, measurement.recipe, planned))
    return lines


def _retries_line(number: int, recipe: Recipe | None, planned: Recipe | None) -> str:
    """How often memory ran out, and the batch that it went down to."""
    said = f"{plural(number, 'retry', 'retries')} after out of memory"
    if not isinstance(recipe, TrainingRecipe):
        return said
    batch = f"{recipe.device_batch_size}"
    if isinstance(planned, TrainingRecipe) and planned.device_batch_size > recipe.device_batch_size:
        batch = f"{planned.device_batch_size} -> {batch}"
    return f"{said}: device_batch_size {batch}"

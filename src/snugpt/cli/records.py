"""`snugpt records`: every past run, predicted ÷ measured."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from snugpt.ledger.accuracy import AccuracyRow, accuracy
from snugpt.ledger.store import read_all
from snugpt.spec.host import default_ledger_folder


@click.command()
@click.option("--ledger", type=click.Path(path_type=Path), help="Folder of the ledger.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def records(ledger: Path | None, as_json: bool) -> None:
    """List how predictions compared with every past run.

    A ratio above 1 is on the safe side. Runs that ended out of memory bound the need from below and
    have no ratio.

    \b
    Example: snugpt records
    """
    found = read_all(ledger or default_ledger_folder())
    rows = accuracy(found)
    if as_json:
        outcomes = {o: sum(m.outcome == o for m in found) for o in ("fit", "oom", "failed")}
        document = {"measurements": len(found), "outcomes": outcomes, "accuracy": rows}
        click.echo(msgspec.json.encode(document).decode())
        return
    if not found:
        click.echo("no runs yet\nhint: snugpt demo", err=True)
        return
    click.echo(f"{len(found)} measurements, predicted ÷ measured")
    for line in table(rows):
        click.echo(line)


def table(rows: tuple[AccuracyRow, ...]) -> list[str]:
    """The rows as lines of at most 80 columns."""
    lines = [f"{'program':<24}{'counter':<12}{'n':>5}{'min':>9}{'median':>9}{'max':>9}{'< 1':>6}"]
    lines += [
        f"{row.program[:23]:<24}{row.counter:<12}{row.n:>5}{row.lowest:>9.4f}{row.middle:>9.4f}"
        f"{row.highest:>9.4f}{row.num_below_1:>6}"
        for row in rows
    ]
    return lines

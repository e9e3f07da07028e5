"""`snugpt records`: every past run, predicted ÷ measured; `accuracy`: this version's grades."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from snugpt.errors import BadQuestionError
from snugpt.ledger.accuracy import AccuracyRow, accuracy
from snugpt.ledger.store import read_all
from snugpt.spec.host import default_ledger_folder
from snugpt.units import plural

# Beside the source; an installed package has no records, so there they are named.
RECORDS = Path(__file__).parents[3] / "records"


@click.group(invoke_without_command=True)
@click.option("--ledger", type=click.Path(path_type=Path), help="Folder of the ledger.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def records(context: click.Context, ledger: Path | None, as_json: bool) -> None:
    """List how predictions compared with every past run.

    A ratio above 1 is on the safe side. Runs that ended out of memory bound the need from below and
    have no ratio.

    \b
    Example: snugpt records
             snugpt records accuracy     what this version predicts, against what others measured
    """
    if context.invoked_subcommand is not None:
        return
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
    number = plural(len(found), "measurement")
    click.echo(f"{number}, predicted ÷ measured; < 1 counts ratios below 1 as shown")
    for line in table(rows):
        click.echo(line)


@records.command("accuracy")
@click.option(
    "--records", "folder", type=click.Path(path_type=Path), default=RECORDS,
    help="Folder of records; the one beside the source if there is one.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--markdown", is_flag=True, help="The page docs/concepts/accuracy.md.")
@click.pass_context
def accuracy_of_records(
    context: click.Context, folder: Path, as_json: bool, markdown: bool
) -> None:
    """Grade this version against published measurements and the records kept in its source.

    Every row is predicted anew or refused with its reason. Nothing here runs on a GPU.

    \b
    Example: snugpt records accuracy
    """
    from snugpt.cli import accuracy_page
    from snugpt.ledger.grading import grade

    before = context.parent.params if context.parent is not None else {}
    as_json = as_json or before.get("as_json", False)
    if before.get("ledger") is not None:
        raise BadQuestionError(
            f"ledger = {str(before['ledger'])!r} decides nothing for accuracy",
            hint="snugpt records accuracy",
        )
    if as_json and markdown:
        raise BadQuestionError(
            "json and markdown are two forms of one answer: one of them",
            hint="snugpt records accuracy --markdown",
        )
    report = grade(folder)
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
        return
    lines = accuracy_page.markdown(report) if markdown else accuracy_page.screen(report)
    for line in lines:
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

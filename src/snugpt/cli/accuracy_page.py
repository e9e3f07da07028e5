"""The grades in words: 80 columns for the terminal, and the page docs/concepts/accuracy.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from snugpt.ledger.grading import Graded, Group, Report, Verdicts
from snugpt.units import MIB, plural

COMMAND = "snugpt records accuracy --markdown > docs/concepts/accuracy.md"
INTRODUCTION = """\
# How good the predictions are

Made by `{command}` from `records/`:
{published} published rows, {own} records of our own on a GPU.

A ratio is predicted ÷ measured peak, by this version; above 1 is on the safe side. No factor was
fitted to any row, but the published rows were at hand while the stacks were derived: none is held
out. *Launcher stated*: the row says how the run was started, or several GPUs leave one way.
*Launcher inferred*: on one card it does not say; of the two ways the one nearer to the figure was
taken, which makes the row weaker evidence. A row that leaves two answers has no ratio.
*Below 1* counts ratios that are below 1 in the digits shown.
"""
HEAD = (
    "row", "stack", "evidence", "predicted MiB", "measured MiB", "ratio", "said", "was", "source",
)  # fmt: skip
NO_GPU = """\
**No record of our own on a GPU exists yet.** What is said of the snugpt stack on CUDA is predicted;
on the CPU the tests compare it with PyTorch's allocator to the byte.
"""
VERDICTS = """\
We say *fits* where the highest process size of the band is within the card. A setup is one model,
batch and card; its runs count once. The bound is one-sided (Clopper and Pearson, 1934): the largest
rate p at which so few errors still have a chance of 5 %, the sum of C(n, i) pⁱ (1 − p)ⁿ⁻ⁱ over
i = 0 to the number of errors. Below, *said* is empty where the card is not in the catalogue or
where the row leaves two answers.
"""


def screen(report: Report) -> Iterator[str]:
    """Lines of at most 80 columns."""
    published = plural(report.num_published, "published row")
    yield f"{published}, {plural(report.num_own, 'record')} of our own on a GPU"
    yield "predicted ÷ measured; above 1 is on the safe side"
    yield ""
    yield f"{'program':<18}{'evidence':<20}{'counter':<10}{'n':>4}{'min':>9}{'median':>9}{'max':>9}"
    for group in report.groups:
        row = group.row
        yield (
            f"{row.program[:17]:<18}{group.evidence[:19]:<20}{row.counter:<10}{row.n:>4}"
            f"{row.lowest:>9.4f}{row.middle:>9.4f}{row.highest:>9.4f}"
        )
    yield ""
    for subject, verdict in verdict_lines(report.verdicts):
        yield f"{subject:<22}{verdict}"
    yield ""
    yield f"not predicted: {plural(sum(refused.n for refused in report.refused), 'row')}"
    for refused in report.refused:
        yield f"{refused.n:>6}  {refused.reason[:70]}"


def verdict_lines(verdicts: Verdicts) -> tuple[tuple[str, str], ...]:
    """Both ways to be wrong about "fits", each with its number and bound."""
    return (
        (
            "false fits",
            _rate(verdicts.false_fits, verdicts.num_oom, verdicts.false_fits_below,
                  "went out of memory"),
        ),
        (
            "false refusals",
            _rate(verdicts.false_refusals, verdicts.num_fit, verdicts.false_refusals_below, "ran"),
        ),
    )  # fmt: skip


def _rate(wrong: int, number: int, below: float | None, happened: str) -> str:
    if below is None:
        return f"no setup that {happened} is predicted: not known"
    return f"{wrong} of {number} setups that {happened}; 95 %: below {below:.0%}"


def markdown(report: Report) -> Iterator[str]:
    """The page, line by line."""
    yield from INTRODUCTION.format(
        command=COMMAND, published=report.num_published, own=report.num_own
    ).splitlines()
    if report.num_own == 0:
        yield ""
        yield from NO_GPU.splitlines()
    yield from ("", "## Peaks", "")
    yield from _rows(
        ("program", "evidence", "counter", "n", "min", "median", "max", "below 1"),
        (_group(group) for group in report.groups),
    )
    yield from ("", "## Verdicts", "")
    for subject, verdict in verdict_lines(report.verdicts):
        yield f"- {subject}: {verdict}."
    yield ""
    yield from VERDICTS.splitlines()
    yield from ("", "## Every row that is predicted", "")
    yield from _rows(
        HEAD,
        (_graded(each) for each in report.graded),
    )
    yield from ("", "## Rows that are not predicted", "")
    yield from _rows(("rows", "reason"), ((str(r.n), r.reason) for r in report.refused))


def _group(group: Group) -> tuple[str, ...]:
    row = group.row
    ratios = (f"{ratio:.4f}" for ratio in (row.lowest, row.middle, row.highest))
    return (row.program, group.evidence, row.counter, str(row.n), *ratios, str(row.num_below_1))


def _graded(each: Graded) -> tuple[str, ...]:
    sizes = (
        "" if size is None else f"{size / MIB:,.1f}"
        for size in (each.predicted_bytes, each.measured_bytes)
    )
    ratio = "" if each.ratio is None else f"{each.ratio:.4f}"
    words = {True: "fits", False: "does not fit", None: ""}
    was = {True: "fits", False: "out of memory", None: ""}
    return (
        each.id, each.program, each.evidence, *sizes, ratio, words[each.said_fits],
        was[each.did_fit], each.source,
    )  # fmt: skip


def _rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """A Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

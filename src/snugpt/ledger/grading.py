"""Grades: what this version predicts, against every record that can be asked about.

Published rows and our own records are predicted anew, so the grade is that of the code at hand.
Out-of-memory rows enter no ratio; they and the runs that fitted grade the verdict.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import msgspec

from snugpt.errors import FailedError
from snugpt.ledger.accuracy import AccuracyRow, accuracy_row
from snugpt.ledger.bounds import upper_bound
from snugpt.ledger.graded import Graded
from snugpt.ledger.own_records import OTHER_FOLDER, content_of, graded_record, own_records
from snugpt.ledger.predicting import NO_RUN, Prediction, Refusal, prediction_of
from snugpt.spec.measurement import Counter
from snugpt.spec.published import PublishedModel, PublishedRow, PublishedRun, Row, published_lines
from snugpt.units import MIB, plural

PUBLISHED, RUNS = "published.jsonl", "published-runs.jsonl"
OWN_FOLDER = "gpu"


class Verdicts(msgspec.Struct, frozen=True, kw_only=True):
    """How often the answer to "does it fit" was wrong, with one-sided 95 % upper bounds.

    `false_fits` of the `num_oom` setups that went out of memory were said to fit, `false_refusals`
    of the `num_fit` that ran were said not to. Runs of one setup count once. A bound is None where
    there was none.
    """

    num_oom: int
    false_fits: int
    false_fits_below: float | None
    num_fit: int
    false_refusals: int
    false_refusals_below: float | None


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """Rows that nothing is said of."""

    reason: str
    n: int


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The ratios of one program by one counter and kind of evidence."""

    evidence: str
    row: AccuracyRow


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All grades: ratios by program, evidence and counter; verdicts; what is refused; each row."""

    num_published: int
    num_own: int
    groups: tuple[Group, ...]
    verdicts: Verdicts
    refused: tuple[Refused, ...]
    graded: tuple[Graded, ...]


def grade(folder: Path) -> Report:
    """Grade every record of a folder laid out as `records/`.

    Raises:
        BadQuestionError: the folder has no published rows.
        FailedError: a file can't be read, a line is not what it should be, or a row of a program
            that is modelled has no run.
    """
    rows = _lines(folder / PUBLISHED, PublishedRow)
    runs = {run.id: run for run in _lines(folder / RUNS, PublishedRun)}
    unknown = runs.keys() - {row.id for row in rows}
    if unknown:
        raise FailedError(
            f"{folder / RUNS} has {sorted(unknown)[0]!r}, which is no row of {PUBLISHED}",
            hint=OTHER_FOLDER,
        )
    found: list[Graded] = []
    refused: Tally[str] = Tally()
    without_run: list[str] = []
    for row in rows:
        said = prediction_of(row, runs.get(row.id))
        if isinstance(said, Refusal):
            refused[said.reason] += 1
            without_run += [row.id] * (said.reason == NO_RUN)
        else:
            found.append(_graded(row, said))
    if without_run:
        raise FailedError(
            f"{folder / RUNS} lacks the run{'s' * (len(without_run) > 1)} of"
            f" {plural(len(without_run), 'row')} of {PUBLISHED}: {', '.join(without_run)}",
            hint=OTHER_FOLDER,
        )
    own = own_records(folder / OWN_FOLDER)
    for record in own:
        grades = graded_record(record)
        refused["card not in the catalogue"] += not grades
        found += grades
    return Report(
        num_published=len(rows),
        num_own=len(own),
        groups=_groups(found),
        verdicts=_verdicts(found),
        refused=tuple(Refused(reason=r, n=n) for r, n in _by_number(+refused)),
        graded=tuple(found),
    )


def _lines(path: Path, kind: type[Row]) -> tuple[Row, ...]:
    return published_lines(content_of(path), kind, str(path))


def _graded(row: PublishedRow, said: Prediction) -> Graded:
    measured = row.measured
    allocated = None if measured.outcome == "oom" else measured.allocated_mib
    did_fit = None if measured.outcome is None else measured.outcome == "fits"
    sure = row.confidence == "exact"
    return Graded(
        id=row.id,
        program=said.stack,
        evidence=said.evidence if sure else f"{said.evidence}, {row.confidence}",
        source=row.source,
        gpu=row.gpu or "",
        setup=_setup(row.model, row.seq_len, row.device_batch_size, row.num_gpus),
        counter="allocated",
        predicted_bytes=said.allocated_bytes,
        measured_bytes=None if allocated is None else round(allocated * MIB),
        said_fits=said.fits,
        did_fit=did_fit,
    )


def _setup(
    model: PublishedModel, seq_len: int | None, batch: int | None, num_gpus: int | None
) -> str:
    return f"L{model.layers} C{model.dim} V{model.vocab} T{seq_len} B{batch} x{num_gpus}"


def _groups(found: Iterable[Graded]) -> tuple[Group, ...]:
    ratios: dict[tuple[str, str, Counter], list[float]] = defaultdict(list)
    for each in found:
        if each.ratio is not None:
            ratios[each.program, each.evidence, each.counter].append(each.ratio)
    return tuple(
        Group(evidence=evidence, row=accuracy_row(program, counter, ratios[key]))
        for key in sorted(ratios)
        for program, evidence, counter in (key,)
    )


def _verdicts(found: Iterable[Graded]) -> Verdicts:
    wrong: dict[bool, dict[tuple[str, str, str], bool]] = {True: {}, False: {}}
    for each in found:
        if each.said_fits is not None and each.did_fit is not None:
            setups, key = wrong[each.did_fit], (each.program, each.gpu, each.setup)
            setups[key] = setups.get(key, False) or each.said_fits != each.did_fit
    full, fitted = wrong[False].values(), wrong[True].values()
    return Verdicts(
        num_oom=len(full),
        false_fits=sum(full),
        false_fits_below=upper_bound(sum(full), len(full)),
        num_fit=len(fitted),
        false_refusals=sum(fitted),
        false_refusals_below=upper_bound(sum(fitted), len(fitted)),
    )


def _by_number(refused: Tally[str]) -> list[tuple[str, int]]:
    return sorted(refused.items(), key=lambda item: (-item[1], item[0]))

"""The published rows are read strictly: a typing error in the data is an error, not a null."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snugpt.errors import FailedError
from snugpt.spec.published import PublishedRow, PublishedRun, published_lines

RECORDS = Path(__file__).parents[2] / "records"
TEXT = (RECORDS / "published.jsonl").read_bytes()
FIRST: dict[str, Any] = json.loads(TEXT.splitlines()[0])


def read(*rows: dict[str, Any]) -> tuple[PublishedRow, ...]:
    return published_lines("\n".join(map(json.dumps, rows)).encode(), PublishedRow, "rows")


def test_every_row_names_its_source_and_is_there_once() -> None:
    rows = published_lines(TEXT, PublishedRow, "published.jsonl")
    assert len(rows) == len({row.id for row in rows}) == 169
    assert all(row.source for row in rows)
    assert {row.measured.outcome for row in rows} == {"fits", "oom", None}


def test_what_is_read_is_what_is_written() -> None:
    import msgspec

    rows = published_lines(TEXT, PublishedRow, "published.jsonl")
    for row, line in zip(rows, TEXT.splitlines(), strict=True):
        assert msgspec.to_builtins(row) == json.loads(line)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 3}, {"kind": "guess"}, {"num_gpus": "8"}, {"confidence": None},
        {"measured": {**FIRST["measured"], "outcome": "fit"}},
        {"measured": {**FIRST["measured"], "peak": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_row_that_is_not_as_described_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FailedError, match="rows line 2"):
        read(FIRST, {**FIRST, "id": "another", **change})


def test_a_field_may_not_be_left_out() -> None:
    with pytest.raises(FailedError, match="grad_accum"):
        read({key: value for key, value in FIRST.items() if key != "grad_accum"})


def test_an_id_may_not_occur_twice() -> None:
    with pytest.raises(FailedError, match="twice"):
        read(FIRST, FIRST)


def test_a_launcher_that_is_not_known_has_no_name() -> None:
    run = {"id": "a", "stack": "nanochat", "launcher": None, "launcher_is": "stated", "because": ""}
    with pytest.raises(FailedError, match="launcher"):
        published_lines(json.dumps(run).encode(), PublishedRun, "runs")

"""`snugpt records accuracy`: on the screen, as JSON, and as the page of the docs."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from door import Door, refusal

RECORDS = Path(__file__).parents[2] / "records"
PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "accuracy.md"


def test_the_committed_page_is_what_the_command_writes(door: Door) -> None:
    done = door("records accuracy --markdown")
    assert (done.code, done.err) == (0, "")
    assert done.out == PAGE.read_text(encoding="utf-8"), (
        "snugpt records accuracy --markdown > docs/concepts/accuracy.md"
    )


def test_the_screen_has_ratios_verdicts_and_refusals_in_80_columns(door: Door) -> None:
    done = door("records accuracy")
    lines = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert max(map(len, lines)) <= 80
    head = ["program", "evidence", "counter", "n", "min", "median", "max"]
    assert lines[3].split() == head
    stated = next(line for line in lines if line.startswith("nanochat@2025-10  launcher stated"))
    n, low, middle, high = stated.split()[-4:]
    assert int(n) >= 5
    assert float(low) <= float(middle) <= float(high)
    assert any(line.startswith("false fits") for line in lines)
    assert any(line.startswith("false refusals") for line in lines)
    assert any("program not modelled: torchtitan" in line for line in lines)


def test_json_is_one_object_with_the_same_figures(door: Door) -> None:
    document = json.loads(door("records accuracy --json").out)
    assert document["num_published"] == 169
    assert {"groups", "verdicts", "refused", "graded"} <= document.keys()
    assert sum(group["row"]["n"] for group in document["groups"]) >= 11
    assert all(each["source"] for each in document["graded"])


def test_json_may_stand_before_the_word(door: Door) -> None:
    assert door("records --json accuracy").out == door("records accuracy --json").out


@pytest.mark.parametrize(
    ("flags", "named"),
    [("accuracy --json --markdown", "json and markdown"), ("--json accuracy --markdown", "json"),
     ("--ledger here accuracy", "ledger = 'here'")],
)  # fmt: skip
def test_what_would_be_dropped_is_refused(flags: str, named: str, door: Door) -> None:
    done = door(f"records {flags}")
    error, hint = refusal(done, 2)
    assert done.out == ""
    assert named in error
    assert door(hint).code == 0


def test_a_broken_line_is_named_and_its_hint_shows_it(door: Door, elsewhere: Path) -> None:
    shutil.copytree(RECORDS, elsewhere / "my records")
    broken = elsewhere / "my records" / "published.jsonl"
    lines = broken.read_text(encoding="utf-8").splitlines()
    lines[2] = '{"id": 3}'
    broken.write_text("\n".join(lines), encoding="utf-8")
    error, hint = refusal(door("records accuracy --records 'my records'"), 1)
    assert error.startswith("my records/published.jsonl line 3: ")
    shown = subprocess.run(shlex.split(hint), capture_output=True, text=True, check=True)
    assert shown.stdout == lines[2] + "\n"


def test_an_emptied_file_of_runs_names_the_runs_that_are_missing(
    door: Door, elsewhere: Path
) -> None:
    shutil.copytree(RECORDS, elsewhere / "theirs")
    runs = elsewhere / "theirs" / "published-runs.jsonl"
    lines = runs.read_text(encoding="utf-8").splitlines()
    runs.write_text("\n".join(lines[1:]), encoding="utf-8")
    error, hint = refusal(door("records accuracy --records theirs"), 1)
    assert error.endswith(
        f"lacks the run of 1 row of published.jsonl: {json.loads(lines[0])['id']}"
    )
    assert hint.startswith("snugpt records accuracy --records ")
    runs.write_bytes(b"")
    error, _ = refusal(door("records accuracy --records theirs"), 1)
    assert f"lacks the runs of {len(lines)} rows" in error
    assert all(json.loads(line)["id"] in error for line in lines)


def test_a_folder_without_records_is_refused_with_a_hint(door: Door) -> None:
    error, hint = refusal(door("records accuracy --records nowhere"), 2)
    assert "published.jsonl is not there" in error
    assert hint.startswith("snugpt records accuracy --records ")


def test_an_unknown_question_about_records_is_refused(door: Door) -> None:
    error, _ = refusal(door("records acuracy"), 2)
    assert "acuracy" in error

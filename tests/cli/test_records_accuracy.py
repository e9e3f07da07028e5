"""`snugpt records accuracy`: on the screen, as JSON, and as the page of the docs."""

from __future__ import annotations

import json
from pathlib import Path

from door import Door, refusal

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


def test_a_folder_without_records_is_refused_with_a_hint(door: Door) -> None:
    error, hint = refusal(door("records accuracy --records nowhere"), 2)
    assert "published.jsonl is not there" in error
    assert hint.startswith("snugpt records accuracy --records ")


def test_an_unknown_question_about_records_is_refused(door: Door) -> None:
    error, _ = refusal(door("records acuracy"), 2)
    assert "acuracy" in error

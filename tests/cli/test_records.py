"""`snugpt records`: predicted ÷ measured of every run, against measurements made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from door import Door, refusal

from snugpt.ledger.store import LEDGER_NAME, append
from snugpt.spec.measurement import Environment, Measurement
from snugpt.spec.memory import BytesBand, MemoryEstimate, MemoryTerm

LEDGER = Path("data/snugpt")


def predicted(allocated: int, process: int) -> MemoryEstimate:
    return MemoryEstimate(
        requested_bytes=allocated, allocated_bytes=allocated,
        reserved_bytes=BytesBand(allocated, allocated, allocated),
        process_bytes=BytesBand(process, process, 2 * process),
        capacity_bytes=10**6, headroom_bytes=0, peak_phase="backward", phases={},
        terms=(
            MemoryTerm(
                name="weights", category="weights", bytes=allocated, formula="n", basis="exact"
            ),
        ),
    )  # fmt: skip


def keep(number: int, **fields: Any) -> None:
    known: dict[str, Any] = {
        "id": f"20261120T110827Z-{number:08d}", "time": "2026-11-20T11:08:27Z",
        "program": "snugpt train", "outcome": "fit", "gpu_id": None, "gpu_name": "a processor",
        "predicted": predicted(1000, 3000),
        "environment": Environment(python="3", platform="p", device="d", snugpt="0"),
    }  # fmt: skip
    append(LEDGER, Measurement(**(known | fields)))


@pytest.fixture
def several(elsewhere: Path) -> None:
    keep(1, allocated_bytes=1000, process_bytes=2000)
    keep(2, allocated_bytes=800, process_bytes=4000)
    keep(3, allocated_bytes=1250, process_bytes=2500)
    keep(4, outcome="oom", allocated_bytes=10)
    keep(5, outcome="failed", process_bytes=10)
    keep(6, program="snugpt.Watch", allocated_bytes=7, predicted=None)


EXPECTED = {"allocated": (0.8, 1.0, 1.25, 1), "process": (0.75, 1.2, 1.5, 1)}


def test_where_nothing_ran_yet_the_demo_is_hinted(door: Door) -> None:
    done = door("records")
    assert done == (0, "", "no runs yet\nhint: snugpt demo\n")


def test_json_of_no_runs_is_still_one_object(door: Door) -> None:
    done = door("records --json")
    assert json.loads(done.out) == {
        "measurements": 0, "outcomes": {"fit": 0, "oom": 0, "failed": 0}, "accuracy": [],
    }  # fmt: skip
    assert (done.code, done.err) == (0, "")


@pytest.mark.usefixtures("several")
def test_the_table_has_the_ratios_of_the_runs_that_fitted(door: Door) -> None:
    first, head, *rows = door("records").out.splitlines()
    assert first == "6 measurements, predicted ÷ measured; < 1 counts ratios below 1 as shown"
    assert head.split()[:6] == ["program", "counter", "n", "min", "median", "max"]
    assert [row.split() for row in rows] == [
        ["snugpt", "train", counter, "3", f"{low:.4f}", f"{middle:.4f}", f"{high:.4f}", str(below)]
        for counter, (low, middle, high, below) in EXPECTED.items()
    ]
    assert max(map(len, [first, head, *rows])) <= 80


def test_a_ratio_that_is_shown_as_1_is_not_counted_below_1(door: Door) -> None:
    keep(1, predicted=predicted(10**6, 3 * 10**6), allocated_bytes=10**6 + 49)
    keep(2, predicted=predicted(10**6, 3 * 10**6), allocated_bytes=10**6 + 51)
    _, _, row = door("records").out.splitlines()
    words = row.split()
    assert (words[2], words[4], words[6], words[7]) == ("allocated", "0.9999", "1.0000", "1")


@pytest.mark.usefixtures("several")
def test_json_holds_the_same_figures_and_every_outcome(door: Door) -> None:
    document = json.loads(door("records --json").out)
    assert document["measurements"] == 6
    assert document["outcomes"] == {"fit": 4, "oom": 1, "failed": 1}
    rows = {row["counter"]: row for row in document["accuracy"]}
    assert rows.keys() == EXPECTED.keys()
    for counter, expected in EXPECTED.items():
        row = rows[counter]
        found = (row["lowest"], row["middle"], row["highest"], row["num_below_1"])
        assert found == pytest.approx(expected)
        assert (row["program"], row["n"]) == ("snugpt train", 3)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("flags", ["", "--json"])
def test_a_torn_line_costs_itself_and_one_line_of_warning(door: Door, flags: str) -> None:
    whole = door(f"records {flags}")
    file = LEDGER / LEDGER_NAME
    file.write_bytes(file.read_bytes() + b'{"schema":1,"id":"2026')
    torn = door(f"records {flags}")
    assert (torn.code, torn.out) == (0, whole.out)
    (line,) = torn.err.splitlines()
    assert f"{LEDGER_NAME} line 7 skipped" in line


@pytest.mark.usefixtures("several")
def test_another_ledger_can_be_named(door: Door) -> None:
    LEDGER.rename("theirs")
    assert door("records").out == ""
    assert door("records --ledger theirs").out.startswith("6 measurements")


def test_a_ledger_that_can_not_be_read_is_refused(door: Door) -> None:
    error, _ = refusal(door("records --ledger text.txt"), 1)
    assert "could not read text.txt" in error

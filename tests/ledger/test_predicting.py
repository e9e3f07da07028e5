"""From a published row to a prediction or to one reason, on rows as shipped and changed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from snugpt.ledger.predicting import Prediction, Refusal, prediction_of
from snugpt.spec.published import PublishedRow, PublishedRun, published_lines
from snugpt.units import MIB

RECORDS = Path(__file__).parents[2] / "records"
ROWS = {
    row.id: row
    for row in published_lines((RECORDS / "published.jsonl").read_bytes(), PublishedRow, "rows")
}
RUNS = {
    run.id: run
    for run in published_lines((RECORDS / "published-runs.jsonl").read_bytes(), PublishedRun, "r")
}
EIGHT_CARDS, ONE_CARD, UNKNOWN = "nc-d20-8h100-b32-4346536", "nc-d10-1x5090-b8", "nc-d20-3090-b4"


def said_of(name: str, **changes: Any) -> Prediction | Refusal:
    return prediction_of(msgspec.structs.replace(ROWS[name], **changes), RUNS.get(name))


def reason(name: str, **changes: Any) -> str:
    found = said_of(name, **changes)
    assert isinstance(found, Refusal)
    return found.reason


def test_every_run_that_is_named_is_predicted_and_no_other_row() -> None:
    predicted = {
        name for name, row in ROWS.items()
        if isinstance(prediction_of(row, RUNS.get(name)), Prediction)
    }  # fmt: skip
    assert predicted == {name for name, run in RUNS.items() if run.stack is not None}


def test_a_row_that_could_be_predicted_and_has_no_run_says_so() -> None:
    row = ROWS[EIGHT_CARDS]
    assert prediction_of(row, None) == Refusal(reason="no run is given for it")


def test_a_run_on_eight_cards_is_predicted_with_its_launcher() -> None:
    found = said_of(EIGHT_CARDS)
    assert isinstance(found, Prediction)
    assert (found.stack, found.evidence) == ("nanochat@2025-10", "launcher stated")
    assert found.allocated_bytes == pytest.approx(75422.02 * MIB, rel=1e-3)
    assert found.capacity_bytes is not None
    assert found.process_high_bytes is not None
    assert found.fits == (found.process_high_bytes <= found.capacity_bytes)


def test_a_launcher_that_is_not_known_leaves_no_figure_but_may_leave_a_verdict() -> None:
    found = said_of(UNKNOWN)
    assert isinstance(found, Prediction)
    assert found.allocated_bytes is None
    assert found.fits is True
    small = said_of("nc-d12-4070-b8-t2048")
    assert isinstance(small, Prediction)
    assert small.fits is None  # one launcher fits into 12 GB, the other does not


def test_an_accumulation_that_is_not_stated_is_tried_both_ways() -> None:
    found = said_of(EIGHT_CARDS, grad_accum=None)
    assert isinstance(found, Prediction)
    assert found.allocated_bytes is None
    more = said_of(EIGHT_CARDS, grad_accum=2)
    assert isinstance(more, Prediction)
    assert more.allocated_bytes is not None
    assert more.allocated_bytes > 75422.02 * MIB * 1.01


def test_a_card_that_is_not_in_the_catalogue_has_a_peak_and_no_verdict() -> None:
    found = said_of("nc-d20-8h20-b32-dd6ff9a")
    assert isinstance(found, Prediction)
    assert found.allocated_bytes == pytest.approx(75422.02 * MIB, rel=1e-3)
    assert (found.fits, found.capacity_bytes) == (None, None)


def test_a_smaller_card_turns_the_verdict() -> None:
    found = said_of(EIGHT_CARDS, gpu="NVIDIA A100 40GB")
    assert isinstance(found, Prediction)
    assert found.fits is False


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("kv-formula-layer", {}, "a formula, not a measurement"),
        ("gf-7b-bf16", {}, "program not modelled: gpt-fast"),
        ("ng-124m-16gb-b32", {}, "program not modelled: nanoGPT"),
        ("nc-mini1-d12", {}, "not a memory row"),
        ("nc-d16-8h100-b16-rms", {}, "model modified"),
        ("nc-d20-8h100-b32-679edf5", {}, "model modified"),
        ("nc-d20-8h100-b32-50413d2-oom", {}, "version not modelled: 50413d2(2026-01)"),
        (EIGHT_CARDS, {"device_batch_size": None}, "shape not stated"),
        (EIGHT_CARDS, {"program": "somethingelse@1"}, "program not modelled: somethingelse"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_phrase(name: str, changes: dict[str, Any], expected: str) -> None:
    assert reason(name, **changes) == expected


def test_a_width_that_is_not_the_dials_is_refused() -> None:
    wide = msgspec.structs.replace(ROWS[ONE_CARD].model, dim=768)
    assert "width 768" in reason(ONE_CARD, model=wide)

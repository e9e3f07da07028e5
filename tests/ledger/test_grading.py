"""Grades over folders of records made here: ratios, verdicts, refusals, our own records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from snugpt.errors import BadQuestionError, FailedError
from snugpt.estimate.memory import memory_estimate
from snugpt.ledger.bounds import upper_bound
from snugpt.ledger.grading import Report, grade
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.measurement import Environment, Measurement
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.shape import shape_for
from snugpt.units import MIB

RECORDS = Path(__file__).parents[2] / "records"
STATED = "nc-d20-8h100-b32-4346536"
SCHEDULE = Schedule(
    learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.0, warmup_fraction=0.0,
    cooldown_fraction=0.0, final_fraction=1.0, clip_norm=1.0, seed=0, eval_every_steps=1,
    eval_tokens=1, save_every_steps=1,
)  # fmt: skip
SHAPE = shape_for("llama", 4, context_len=512, vocab_size=4096)
RECIPE = TrainingRecipe(
    seq_len=512, device_batch_size=4, grad_accum_steps=1, total_batch_tokens=2048,
    total_tokens=2048, compute_dtype="bf16", loss="chunked", loss_chunk_tokens=512,
    checkpoint="none", optimizer="adamw", schedule=SCHEDULE,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Records with one published row and no run of our own."""
    for name in ("published.jsonl", "published-runs.jsonl"):
        lines = (RECORDS / name).read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["id"] == STATED]
        (tmp_path / name).write_text("\n".join(kept) + "\n", encoding="utf-8")
    return tmp_path


def add(folder: Path, name: str, gpu: str, outcome: str, allocated_mib: float | None) -> None:
    """The published row again under another name, on another card, with another end."""
    rows = folder / "published.jsonl"
    row = json.loads(rows.read_text(encoding="utf-8").splitlines()[0])
    measured = {**row["measured"], "outcome": outcome, "allocated_mib": allocated_mib}
    row |= {"id": name, "gpu": gpu, "measured": measured}
    runs = folder / "published-runs.jsonl"
    run = json.loads(runs.read_text(encoding="utf-8").splitlines()[0]) | {"id": name}
    for path, line in ((rows, row), (runs, run)):
        path.write_text(
            path.read_text(encoding="utf-8") + json.dumps(line) + "\n", encoding="utf-8"
        )


def add_own(folder: Path, name: str, factor: float = 1.0, **fields: Any) -> None:
    """A record of the campaign that took `factor` of what is predicted."""
    said = memory_estimate(SHAPE, RECIPE, find_gpu("h200"))
    measurement = Measurement(
        id=f"id {name}", time="2026-11-20T11:08:27Z", program="snugpt campaign",
        outcome=fields.pop("outcome", "fit"), gpu_id=fields.pop("gpu_id", "h200"),
        gpu_name="NVIDIA H200", shape=SHAPE, recipe=RECIPE, predicted=said,
        allocated_bytes=round(said.allocated_bytes * factor),
        reserved_bytes=round(said.reserved_bytes.expected * factor),
        environment=Environment(python="3", platform="p", device="NVIDIA H200", snugpt="0"),
    )  # fmt: skip
    line = {"name": name, "kind": "training", "measurement": msgspec.to_builtins(measurement)}
    path = folder / "gpu" / "eager.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | fields) + "\n")


def groups(report: Report) -> dict[tuple[str, str, str], tuple[int, float, float, float, int]]:
    found = {}
    for group in report.groups:
        row = group.row
        key = (row.program, group.evidence, row.counter)
        found[key] = (row.n, row.lowest, row.middle, row.highest, row.num_below_1)
    return found


def test_ratios_are_predicted_over_measured_by_program_evidence_and_counter(folder: Path) -> None:
    predicted = grade(folder).graded[0].predicted_bytes
    assert predicted is not None
    add(folder, "half", "NVIDIA H100 80GB", "fits", predicted / MIB / 2)
    add(folder, "double", "NVIDIA H100 80GB", "fits", predicted / MIB * 2)
    ((key, (n, low, middle, high, below)),) = groups(grade(folder)).items()
    assert key == ("nanochat@2025-10", "launcher stated", "allocated")
    assert (n, below) == (3, 1)
    assert (low, high) == pytest.approx((0.5, 2.0))
    assert middle == pytest.approx(1.0, abs=1e-3)


def test_both_wrong_verdicts_are_counted_with_their_bounds(folder: Path) -> None:
    add(folder, "refused but ran", "NVIDIA A100 40GB", "fits", 1000.0)
    add(folder, "said to fit", "NVIDIA H100 80GB SXM", "oom", 70000.0)
    verdicts = grade(folder).verdicts
    assert (verdicts.num_oom, verdicts.false_fits, verdicts.false_fits_below) == (1, 1, 1.0)
    assert (verdicts.num_fit, verdicts.false_refusals) == (2, 1)
    assert verdicts.false_refusals_below == upper_bound(1, 2)


def test_runs_of_one_setup_are_one_trial_of_the_verdict(folder: Path) -> None:
    add(folder, "the same again", "NVIDIA H100 80GB", "fits", 75000.0)
    assert grade(folder).verdicts.num_fit == 1


def test_out_of_memory_enters_no_ratio(folder: Path) -> None:
    add(folder, "full", "NVIDIA A100 40GB", "oom", 39000.0)
    report = grade(folder)
    assert [row.n for row in (g.row for g in report.groups)] == [1]
    assert (report.verdicts.num_oom, report.verdicts.false_fits) == (1, 0)


def test_our_own_records_are_predicted_anew_and_held_out_ones_apart(folder: Path) -> None:
    add_own(folder, "a")
    add_own(folder, "b", factor=2.0, held_out=True)
    report = grade(folder)
    found = groups(report)
    assert report.num_own == 2
    for counter in ("allocated", "reserved"):
        assert found["snugpt", "our own", counter] == pytest.approx((1, 1, 1, 1, 0), abs=1e-6)
        held = found["snugpt", "our own, held out", counter]
        assert held == pytest.approx((1, 0.5, 0.5, 0.5, 1), abs=1e-6)
    assert ("snugpt", "our own", "process") not in found  # nothing counted it
    assert report.verdicts.num_fit == 3


def test_our_own_run_out_of_memory_is_a_verdict_and_no_ratio(folder: Path) -> None:
    add_own(folder, "full", outcome="oom")
    report = grade(folder)
    assert not [key for key in groups(report) if key[0] == "snugpt"]
    assert (report.verdicts.num_oom, report.verdicts.false_fits) == (1, 1)


def test_toys_failures_and_what_was_measured_again_do_not_count(folder: Path) -> None:
    add_own(folder, "toy", toy=True)
    add_own(folder, "failed", outcome="failed")
    add_own(folder, "again", factor=3.0)
    add_own(folder, "again")
    report = grade(folder)
    assert report.num_own == 1
    assert groups(report)["snugpt", "our own", "allocated"][0:2] == pytest.approx((1, 1.0))


def test_our_own_record_of_an_unknown_card_is_refused_with_its_reason(folder: Path) -> None:
    add_own(folder, "elsewhere", gpu_id=None)
    assert [(r.reason, r.n) for r in grade(folder).refused] == [("card not in the catalogue", 1)]


def test_trials_within_a_cap_are_verdicts_on_what_is_reserved(folder: Path) -> None:
    def reserved(batch: int) -> int:
        tokens = batch * RECIPE.seq_len
        recipe = msgspec.structs.replace(
            RECIPE, device_batch_size=batch, total_batch_tokens=tokens, total_tokens=tokens
        )
        return memory_estimate(SHAPE, recipe, find_gpu("h200")).reserved_bytes.high

    assert reserved(3) < reserved(4)
    outcomes = {2: "fit", 3: "oom", 4: "fit", 5: "oom", 6: "failed"}
    boundary = {
        "cap_bytes": reserved(3), "shape": msgspec.to_builtins(SHAPE),
        "recipe": msgspec.to_builtins(RECIPE), "gpu_id": "h200", "gpu_name": "NVIDIA H200",
        "trials": [{"batch": b, "outcome": outcome} for b, outcome in outcomes.items()],
    }  # fmt: skip
    line = {"name": "boundary", "kind": "boundary", "boundary": boundary}
    (folder / "gpu").mkdir()
    (folder / "gpu" / "eager.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    report = grade(folder)
    trials = {each.id: (each.said_fits, each.did_fit) for each in report.graded[1:]}
    assert trials == {
        "boundary, batch 2": (True, True), "boundary, batch 3": (True, False),
        "boundary, batch 4": (False, True), "boundary, batch 5": (False, False),
    }  # fmt: skip
    verdicts = report.verdicts
    assert (verdicts.num_oom, verdicts.false_fits) == (2, 1)
    assert (verdicts.num_fit, verdicts.false_refusals) == (3, 1)


def test_lines_of_the_campaign_without_a_measurement_are_passed_over(folder: Path) -> None:
    add_own(folder, "a")
    with (folder / "gpu" / "eager.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"name": "scratch-attention", "kind": "scratch", "measured": {}}\n')
    assert grade(folder).num_own == 1


def test_a_run_of_no_row_is_an_error(folder: Path) -> None:
    runs = folder / "published-runs.jsonl"
    runs.write_text(runs.read_text(encoding="utf-8").replace(STATED, "another"), encoding="utf-8")
    with pytest.raises(FailedError, match="'another'"):
        grade(folder)


def test_a_folder_without_records_is_a_bad_question(tmp_path: Path) -> None:
    with pytest.raises(BadQuestionError, match="is not there"):
        grade(tmp_path / "nothing")


def test_a_damaged_record_of_ours_names_its_line(folder: Path) -> None:
    add_own(folder, "a")
    with (folder / "gpu" / "eager.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"name": "torn\n')
    with pytest.raises(FailedError, match=r"eager.jsonl line 2"):
        grade(folder)


def test_the_shipped_published_rows_are_graded_or_refused_each(tmp_path: Path) -> None:
    for name in ("published.jsonl", "published-runs.jsonl"):
        shutil.copy(RECORDS / name, tmp_path)
    report = grade(tmp_path)
    assert report.num_published == 169
    assert len(report.graded) + sum(each.n for each in report.refused) == 169

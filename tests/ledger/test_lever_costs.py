"""What levers cost in time: records, the factors they make, and where the estimate uses them."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from snugpt.errors import BadQuestionError, FailedError
from snugpt.estimate import lever_times
from snugpt.estimate.speed import step_time_s
from snugpt.ledger.lever_costs import LeverCost, factors, read
from snugpt.planner.answer import plan
from snugpt.spec.calibration import Calibration
from snugpt.spec.measurement import Environment

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "records" / "lever-costs.jsonl"
sys.path.insert(0, str(ROOT / "bench"))


def record(number: int, **fields: Any) -> LeverCost:
    known = {
        "id": f"r{number}", "time": "2026-11-20T00:00:00Z", "backend": "cpu",
        "lever": "checkpoint blocks", "sizes": {"width": 64}, "pairs": 3, "low": 1.1, "ratio": 1.2,
        "high": 1.3, "noise_low": 0.99, "noise_high": 1.01, "counted": 1.25,
        "environment": Environment(python="3.11", platform="linux", device="cpu", snugpt="0"),
    }  # fmt: skip
    return LeverCost(**(known | fields))


def test_three_records_make_a_factor_and_two_do_not() -> None:
    ratios = (1.2, 1.25, 1.5)
    three = [record(n, ratio=r, high=2.0) for n, r in enumerate(ratios)]
    assert factors(three[:2]) == {}
    found = factors(three)["cpu"]["checkpoint blocks"]
    assert (found.low, found.value, found.high) == (1.2 / 1.25, 1.0, 1.5 / 1.25)
    assert factors([three[0]] * 3) == {}  # one line copied is one record


def test_factors_are_kept_apart_by_device_and_lever() -> None:
    lines = [record(n, backend=b) for b in ("cpu", "cuda") for n in range(3)]
    lines += [record(n, lever="state_dtype int8", counted=1.0) for n in range(3)]
    lines += [record(n, lever="half the batch twice") for n in range(3)]
    found = factors(lines)
    assert {b: set(levers) for b, levers in found.items()} == {
        "cpu": {"checkpoint blocks", "state_dtype int8"}, "cuda": {"checkpoint blocks"},
    }  # fmt: skip


def test_a_file_of_records_is_read_and_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "costs.jsonl"
    assert read(path) == []
    path.write_bytes(msgspec.json.encode(record(1)) + b"\n")
    assert read(path) == [record(1)]
    path.write_bytes(path.read_bytes() + b'{"id": 3}\n')
    with pytest.raises(FailedError, match="line 2"):
        read(path)
    with pytest.raises(BadQuestionError, match="ratio"):
        record(1, ratio=0.5)


def test_a_fitted_factor_moves_the_time_of_its_device_and_of_no_other(monkeypatch) -> None:
    made = {"cpu": Calibration(factors=factors(record(n, ratio=1.1) for n in range(3))["cpu"])}
    gpu = plan(gpu="rtx-4090", depth=12)
    blocks = replace(gpu.recipe, checkpoint="blocks", selective_steps=(), compile="off")
    cpu = replace(gpu.gpu, backend="cpu")
    monkeypatch.setattr(lever_times, "fitted", dict)  # as if nothing had been measured
    before = {card.backend: step_time_s(gpu.shape, blocks, card, 1e13) for card in (gpu.gpu, cpu)}
    monkeypatch.setattr(lever_times, "fitted", lambda: made)
    none = replace(blocks, checkpoint="none")
    assert lever_times.time_factor(none, "cpu") == 1.0
    after = {card.backend: step_time_s(gpu.shape, blocks, card, 1e13) for card in (gpu.gpu, cpu)}
    assert after["cuda"] == before["cuda"]
    assert after["cpu"] == pytest.approx(before["cpu"] * 1.1 / 1.25)


def test_other_programs_are_not_corrected(monkeypatch) -> None:
    made = {"cuda": Calibration(factors=factors(
        record(n, backend="cuda", lever="compile on") for n in range(3)
    )["cuda"])}  # fmt: skip
    monkeypatch.setattr(lever_times, "fitted", lambda: made)
    theirs = plan(stack="nanochat", gpu="h100", depth=12).recipe
    assert lever_times.time_factor(theirs, "cuda") == 1.0


def test_the_factors_that_are_used_are_those_of_the_records() -> None:
    made = {b: Calibration(factors=found) for b, found in factors(read(RECORDS)).items()}
    assert lever_times.fitted() == made


def test_a_lever_is_measured_against_the_plain_steps_on_both_sides_of_it() -> None:
    bench = import_module("lever_costs")
    now_s, calls = 0.0, {"plain": 0, "other": 0}

    def taking(name: str, seconds):
        def work() -> None:
            nonlocal now_s
            now_s += seconds(calls[name])
            calls[name] += 1

        return work

    # The machine gets slower all the time; the lever costs a quarter more at any moment.
    plain, other = (
        taking("plain", lambda n: 1 + 0.1 * n),
        taking("other", lambda n: 1.25 * (1.05 + 0.1 * n)),
    )
    found = bench.paired(plain, other, pairs=5, clock=lambda: now_s)
    assert found.middle == pytest.approx(1.25)
    assert found.high - found.low == pytest.approx(0.0, abs=1e-9)

"""The rate of this machine: measured by real steps, kept, and found by later plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from snugpt.cli.main import run
from snugpt.errors import FailedError
from snugpt.planner.machine import measured_rates, this_processor
from snugpt.run import machine_speed
from snugpt.run.machine_speed import keep_cpu_rate, measure_cpu_rate


def test_a_rate_is_measured_without_touching_the_callers_random_state() -> None:
    before = torch.random.get_rng_state()
    shares: list[float] = []
    rate = measure_cpu_rate(0.0, tick=shares.append)
    assert 1e7 < rate < 1e14
    assert shares[-1] == 1.0
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_kept_rate_is_what_later_plans_find(tmp_path: Path) -> None:
    keep_cpu_rate(tmp_path, 1.5e11)
    assert measured_rates(tmp_path) == {"cpu": 1.5e11}
    assert this_processor(measured_rates(tmp_path)).measured_flops_per_s == 1.5e11


def test_a_rate_that_can_not_be_kept_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FailedError):
        keep_cpu_rate(tmp_path / "file", 1e11)


def test_plan_measure_makes_its_times_measured_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine_speed, "measure_cpu_rate", lambda: 1.2e11)
    question = ["plan", "--gpu", "cpu", "--depth", "2", "--seq-len", "64"]
    assert run(question) == 0
    assert "measured on this machine" not in " ".join(capsys.readouterr().out.split())
    assert run([*question, "--measure"]) == 0
    assert "measured on this machine" in " ".join(capsys.readouterr().out.split())

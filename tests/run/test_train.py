"""A run, its end and its receipt: what it writes, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch
from tiny_plan import Seen, run_tiny, tiny_plan, write_text
from tiny_training import exit_code_of, fork

import snugpt.run.saving as saving
import snugpt.run.train as training
from snugpt.errors import DoesNotFitError, FailedError
from snugpt.estimate.memory import batch_of, runtime_of, timeline_of
from snugpt.ledger.store import read_all
from snugpt.run.reports import Notice, StepReport
from snugpt.run.run_folder import RunFolder
from snugpt.spec.measurement import Measurement, measurement_from_json
from snugpt.spec.plan import Plan

LOWEST_RATIO, HIGHEST_RATIO = 0.999, 1.001


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture(autouse=True)
def _every_step_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snugpt.run.progress.LOG_EVERY_S", 0.0)


def logged(folder: RunFolder, kind: str) -> list[int]:
    return [line["step"] for line in folder.metrics() if line["kind"] == kind]


def assert_predicted(plan: Plan, measurement: Measurement | None) -> None:
    """Predicted ÷ measured, allocated, of the whole and of each phase."""
    assert measurement is not None
    assert LOWEST_RATIO <= measurement.ratios["allocated"] <= HIGHEST_RATIO
    runtime = runtime_of(plan.shape, plan.recipe, plan.gpu, torch.get_num_threads())
    _, phases = timeline_of(plan.shape, plan.recipe, runtime).read(batch_of(plan.recipe))
    assert measurement.phases is not None
    assert measurement.phases.keys() == phases.keys()
    for phase, measured in measurement.phases.items():
        assert LOWEST_RATIO <= phases[phase] / measured <= HIGHEST_RATIO, phase


@pytest.mark.parametrize("style", ["nanochat", "llama", "gpt2"])
def test_the_receipt_agrees_with_the_prediction_in_every_phase(tmp_path, text, style) -> None:
    plan = tiny_plan(text, style, steps=3)
    result = run_tiny(plan, tmp_path / "run", argv=("snugpt", "train", "a plan.json"))
    assert_predicted(plan, result.measurement)
    assert result.measurement.predicted == plan.memory
    assert result.measurement.steps == 3
    assert result.measurement.final_loss == result.folder.metrics()[-2]["loss"]
    assert result.measurement.bits_per_byte == result.bits_per_byte
    assert result.measurement.counters == {
        "allocated": "torch CPU allocator events",
        "reserved": "torch CPU allocator events",
        "process": "peak resident size",
    }


def test_the_receipt_lies_in_the_folder_and_in_the_ledger(tmp_path: Path, text: Path) -> None:
    result = run_tiny(tiny_plan(text, steps=3), tmp_path / "run", argv=("snugpt", "train", "x y"))
    stored = measurement_from_json(result.folder.measurement_file.read_bytes())
    assert stored == result.measurement
    assert read_all(tmp_path / "ledger") == [stored]
    assert (result.folder.path / "argv").read_text() == "snugpt train 'x y'\n"
    assert result.folder.plan() == tiny_plan(text, steps=3)


def test_a_resumed_run_has_a_receipt_of_its_own_that_agrees(tmp_path, text, monkeypatch) -> None:
    plan = tiny_plan(text, "gpt2", steps=3)
    fail_at_save_of(monkeypatch, 3)
    with pytest.raises(FailedError):
        run_tiny(plan, tmp_path / "run")
    monkeypatch.undo()
    result = run_tiny(plan, tmp_path / "run")
    assert result.finished
    assert_predicted(plan, result.measurement)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_are_logged_evaluated_and_saved(tmp_path, text, steps: int) -> None:
    plan = tiny_plan(text, steps=steps, eval_every_steps=100, save_every_steps=100)
    result = run_tiny(plan, tmp_path / "run")
    assert result.finished
    assert result.bits_per_byte is not None
    assert logged(result.folder, "step") == list(range(1, steps + 1))
    assert logged(result.folder, "evaluation") == [steps]
    assert [path.name for path in result.folder.checkpoints.iterdir()] == [f"step-{steps:08d}"]


def test_every_step_is_evaluated_and_saved_where_the_plan_says_so(tmp_path, text) -> None:
    plan = tiny_plan(text, steps=4, eval_every_steps=1, save_every_steps=1)
    seen = Seen()
    result = run_tiny(plan, tmp_path / "run", seen)
    assert logged(result.folder, "evaluation") == [1, 2, 3, 4]
    saved = sorted(path.name for path in result.folder.checkpoints.iterdir())
    assert saved == ["step-00000003", "step-00000004"]
    assert_predicted(plan, result.measurement)
    assert [r.step for r in seen.of(StepReport)] == [1, 2, 3, 4]


def test_a_finished_run_says_so_and_takes_no_step(tmp_path: Path, text: Path) -> None:
    plan, seen = tiny_plan(text, steps=3), Seen()
    first = run_tiny(plan, tmp_path / "run")
    metrics = first.folder.metrics_file.read_bytes()
    second = run_tiny(plan, tmp_path / "run", seen)
    assert (second.finished, second.steps, second.measurement) == (True, 3, None)
    assert second.bits_per_byte == first.bits_per_byte
    assert seen[-1] == Notice(text="finished before, after step 3")
    assert not seen.of(StepReport)
    assert first.folder.metrics_file.read_bytes() == metrics


def test_the_same_plan_gives_the_same_loss_and_a_training_that_learns(tmp_path, text) -> None:
    often = {"save_every_steps": 100, "eval_every_steps": 100}
    plan = tiny_plan(text, steps=30, warmup_fraction=0.0, learning_rate=3e-3, **often)
    results = [run_tiny(plan, tmp_path / name) for name in ("one", "two")]
    losses = [[m["loss"] for m in r.folder.metrics() if "loss" in m] for r in results]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.5


@pytest.mark.parametrize("change", ["recipe", "shape"])
def test_another_plan_in_the_same_folder_is_refused(tmp_path, text, change: str) -> None:
    result = run_tiny(tiny_plan(text, steps=2), tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("run/**/*") if path.is_file()}
    other = tiny_plan(text, steps=3) if change == "recipe" else tiny_plan(text, vocab=320, steps=2)
    with pytest.raises(FailedError, match=f"another {change}") as caught:
        run_tiny(other, result.folder.path)
    assert caught.value.hint == "snugpt train --name run-2"
    assert {path: path.read_bytes() for path in before} == before


def test_text_that_changed_under_a_run_is_refused(tmp_path: Path, text: Path) -> None:
    plan = tiny_plan(text, steps=2)
    run_tiny(plan, tmp_path / "run")
    write_text(text, num_words=4200)
    with pytest.raises(FailedError, match="corpus_sha256 of step 2") as caught:
        run_tiny(plan, tmp_path / "run")
    assert "\n" not in caught.value.message


def test_two_trainers_in_one_folder_are_refused(tmp_path: Path, text: Path) -> None:
    plan, exit_codes = tiny_plan(text, steps=3), []

    def second() -> None:
        with pytest.raises(FailedError, match="is writing the run"):
            run_tiny(plan, tmp_path / "run")

    def watcher(report) -> None:
        if isinstance(report, StepReport) and report.step == 2:
            exit_codes.append(exit_code_of(fork(second)))

    assert run_tiny(plan, tmp_path / "run", watcher).finished
    assert exit_codes == [0]


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_made(tmp_path, text) -> None:
    plan = msgspec.structs.replace(tiny_plan(text), fits=False)
    with pytest.raises(DoesNotFitError):
        run_tiny(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_newest_checkpoint_is_passed_over_with_one_notice(tmp_path, text) -> None:
    plan, seen = tiny_plan(text, "gpt2", steps=6, save_every_steps=2), Seen()
    whole = run_tiny(plan, tmp_path / "run").folder
    newest = whole.checkpoints / "step-00000006"
    wanted = (newest / "model.safetensors").read_bytes()
    damaged = bytearray(wanted)
    damaged[-1] ^= 1
    (newest / "model.safetensors").write_bytes(damaged)
    result = run_tiny(plan, tmp_path / "run", seen)
    texts = [notice.text for notice in seen.of(Notice)]
    assert len([line for line in texts if "damaged" in line]) == 1
    assert "resumed after step 4" in texts
    assert result.finished
    assert [r.step for r in seen.of(StepReport)] == [5, 6]
    assert (newest / "model.safetensors").read_bytes() == wanted


def fail_at_save_of(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The disk is full when these steps are saved: the write of a tensor fails."""
    save = saving.save_checkpoint

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    def saved(folder, step, *rest):
        with pytest.MonkeyPatch.context() as disk:
            if step in steps:
                disk.setattr("snugpt.run.manifest.durable_file", full)
            return save(folder, step, *rest)

    monkeypatch.setattr(saving, "save_checkpoint", saved)


def test_a_full_disk_at_a_save_on_the_way_costs_a_notice(tmp_path, text, monkeypatch) -> None:
    whole = run_tiny(tiny_plan(text, "gpt2"), tmp_path / "whole").folder
    fail_at_save_of(monkeypatch, 4)
    seen = Seen()
    result = run_tiny(tiny_plan(text, "gpt2"), tmp_path / "run", seen)
    texts = [notice.text for notice in seen.of(Notice)]
    assert [t for t in texts if "No space left" in t and t.endswith("training goes on")]
    assert len([t for t in texts if "could not save step 4" in t]) == 1
    steps = sorted(path.name for path in result.folder.checkpoints.iterdir())
    assert steps == ["step-00000002", "step-00000006"]
    ends = [f.checkpoints / "step-00000006" / "model.safetensors" for f in (whole, result.folder)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_a_full_disk_at_the_last_save_fails_and_keeps_the_one_before(
    tmp_path, text, monkeypatch
) -> None:
    fail_at_save_of(monkeypatch, 6)
    plan, seen = tiny_plan(text), Seen()
    with pytest.raises(FailedError, match=r"could not save step 6.*No space left") as caught:
        run_tiny(plan, tmp_path / "run")
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    assert run_tiny(plan, tmp_path / "run", seen).finished
    assert "resumed after step 4" in [notice.text for notice in seen.of(Notice)]


def test_metrics_and_ledger_that_can_not_be_written_cost_notices_not_the_run(
    tmp_path: Path, text: Path
) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "ledger").write_text("a file where a folder should be")
    seen = Seen()
    result = run_tiny(tiny_plan(text, steps=4), tmp_path / "run", seen)
    assert result.finished
    texts = [notice.text for notice in seen.of(Notice)]
    assert len([line for line in texts if "metrics.jsonl" in line]) == 1
    assert len([line for line in texts if line.startswith("measurement not kept")]) == 1
    assert result.folder.measurement_file.is_file()


@pytest.mark.parametrize("steps", [1, 2, 5])  # in the metered steps and after them
def test_a_loss_that_is_no_number_fails_and_keeps_earlier_checkpoints(
    tmp_path, text, monkeypatch, steps: int
) -> None:
    spoil(monkeypatch, after_step=steps)
    plan = tiny_plan(text, save_every_steps=1)
    with pytest.raises(FailedError, match=f"is nan after step {steps}") as caught:
        run_tiny(plan, tmp_path / "run")
    assert "learning-rate" in (caught.value.hint or "")
    monkeypatch.undo()
    monkeypatch.setattr("snugpt.run.progress.LOG_EVERY_S", 0.0)
    seen = Seen()
    result = run_tiny(plan, tmp_path / "run", seen)
    assert math.isfinite(result.bits_per_byte)
    assert seen.of(StepReport)[0].step == steps  # goes on behind the sound checkpoint


def test_weights_that_are_no_number_are_never_saved(tmp_path, text, monkeypatch) -> None:
    monkeypatch.setattr("snugpt.run.progress.LOG_EVERY_S", math.inf)  # the loss is not looked at
    spoil(monkeypatch, after_step=3, loss=False)
    with pytest.raises(FailedError, match="norm of the weights is nan after step 4"):
        run_tiny(tiny_plan(text, save_every_steps=2), tmp_path / "run")
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ["step-00000002"]


def spoil(monkeypatch: pytest.MonkeyPatch, *, after_step: int, loss: bool = True) -> None:
    """Make a step return a loss that is no number, or leave such weights behind."""
    take, taken = training.take_step, 0

    def spoilt(model, *arguments):
        nonlocal taken
        found = take(model, *arguments)
        taken += 1
        if taken >= after_step and not loss:
            with torch.no_grad():
                model.embedding[0, 0] = math.nan
        return found * math.nan if loss and taken >= after_step else found

    monkeypatch.setattr(training, "take_step", spoilt)


def test_a_run_that_fails_in_its_first_steps_leaves_no_recording_behind(
    tmp_path, text, monkeypatch
) -> None:
    spoil(monkeypatch, after_step=1)
    with pytest.raises(FailedError):
        run_tiny(tiny_plan(text), tmp_path / "run")
    assert not torch.autograd._profiler_enabled()

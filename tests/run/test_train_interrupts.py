"""Ctrl-C and SIGTERM at any stage: the run is saved, says what ended it, and goes on exactly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

import pytest
from test_train_kills import STEPS, assert_same_run
from tiny_plan import Seen, run_tiny, tiny_plan, write_text

from snugpt.run.reports import StepReport


@pytest.fixture(autouse=True)
def _every_step_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snugpt.run.progress.LOG_EVERY_S", 0.0)


def after(number: int, call: Callable, name: str) -> Callable:
    """The call, with a signal to this process after its `number`-th time."""
    left = number

    def signalled(*arguments, **named):
        nonlocal left
        result = call(*arguments, **named)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.Signals[name])
        return result

    return signalled


# What is called when the signal comes, how often before, and the step that is saved then.
STAGES = {
    "preparing": ("snugpt.data.prepare._encode", 1, 0),
    "building": ("snugpt.run.train.build_for_training", 1, 0),
    "first step": ("snugpt.model.gpt.GPT.loss", 1, 1),
    "metered step": ("snugpt.model.gpt.GPT.loss", 3, 2),
    "step": ("snugpt.model.gpt.GPT.loss", 9, 5),
    "evaluation": ("snugpt.run.evaluate.evaluate_batch", 5, 6),  # one metered, three of step 3
    "save": ("snugpt.run.saving.save_checkpoint", 2, 4),
    "last step": ("snugpt.model.gpt.GPT.loss", 2 * STEPS, STEPS),
    "last evaluation": ("snugpt.run.evaluate.evaluate_batch", 11, STEPS),
}


@pytest.mark.parametrize(("style", "name"), [("nanochat", "SIGINT"), ("gpt2", "SIGTERM")])
def test_a_run_stopped_at_every_stage_saves_and_goes_on_exactly(
    tmp_path: Path, style, name: str
) -> None:
    plan = tiny_plan(write_text(tmp_path / "text.txt"), style, steps=STEPS)
    whole = run_tiny(plan, tmp_path / "whole" / "run").folder
    for stage, (target, number, steps) in STAGES.items():
        path = tmp_path / stage.replace(" ", "-") / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, after(number, resolve_name(target), name))
            stopped = run_tiny(plan, path)
        assert (stopped.interrupted_by, stopped.steps) == (name, steps), stage
        assert (stopped.folder.checkpoints / f"step-{steps:08d}").is_dir(), stage
        evaluated = [m["step"] for m in stopped.folder.metrics() if m["kind"] == "evaluation"]
        assert steps not in evaluated, stage  # it was cut short
        seen = Seen()
        resumed = run_tiny(plan, path, seen)
        assert resumed.interrupted_by is None
        assert resumed.finished
        assert len(seen.of(StepReport)) == STEPS - steps, stage
        assert resumed.bits_per_byte is not None
        assert_same_run(resumed.folder, whole, state=steps < STEPS)


def test_a_run_stopped_before_its_next_evaluation_still_knows_the_last(tmp_path: Path) -> None:
    plan = tiny_plan(write_text(tmp_path / "text.txt"), steps=STEPS)
    found = []
    for target, number in (
        ("snugpt.model.gpt.GPT.loss", 8),
        ("snugpt.run.train.build_for_training", 1),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, after(number, resolve_name(target), "SIGTERM"))
            found.append(run_tiny(plan, tmp_path / "run"))
    assert [result.steps for result in found] == [4, 4]
    assert found[0].bits_per_byte == found[1].bits_per_byte is not None

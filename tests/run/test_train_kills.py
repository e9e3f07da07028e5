"""A run that was killed at any moment and started again is the run that was not killed."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_plan import run_tiny, tiny_plan, write_text
from tiny_training import exit_code_of, fork

import snugpt.data.prepare
import snugpt.run.evaluate
import snugpt.run.saving
import snugpt.run.train
from snugpt.model.adamw import AdamW
from snugpt.model.gpt import GPT
from snugpt.run.run_folder import RunFolder

STEPS = 12
NUM_RANDOM_KILLS = 8
LONGEST_RANDOM_LEG = 12_000  # calls of Python functions; a whole run makes about twice as many

# Where a leg of the run dies: before or after the n-th call of a function. Steps are saved at 2, 4
# and so on and evaluated at 3, 6 and so on; each leg goes on from the last save.
MOMENTS: tuple[tuple[Any, str, int, str], ...] = (
    (snugpt.data.prepare, "_train", 1, "after"),
    (snugpt.data.prepare, "_encode", 1, "after"),
    (snugpt.run.train, "build_for_training", 1, "before"),
    (GPT, "loss", 2, "before"),
    (snugpt.run.saving, "save_checkpoint", 1, "before"),
    (Path, "rename", 1, "before"),
    (Path, "rename", 1, "after"),  # of step 2, which so is the first that is kept
    (snugpt.run.evaluate, "evaluate_batch", 2, "after"),
    (RunFolder, "log", 2, "after"),
    (snugpt.run.saving, "save_checkpoint", 1, "after"),  # step 4
    (torch.nn.utils, "clip_grad_norm_", 2, "after"),
    (AdamW, "step", 2, "before"),
    (snugpt.run.saving, "save_checkpoint", 2, "after"),  # steps 6 and 8
    (snugpt.run.train, "restore", 1, "after"),
    (snugpt.run.train, "bits_per_byte", 2, "after"),
)


@pytest.fixture(autouse=True)
def _every_step_is_logged_on_one_thread(monkeypatch: pytest.MonkeyPatch):
    """Forks copy no worker threads, so there are none to miss."""
    monkeypatch.setattr("snugpt.run.progress.LOG_EVERY_S", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("style", ["nanochat", "gpt2"])
def test_a_run_killed_at_every_stage_ends_like_one_that_was_not(tmp_path: Path, style) -> None:
    plan = tiny_plan(write_text(tmp_path / "text.txt"), style, steps=STEPS)
    whole = run_tiny(plan, tmp_path / "whole" / "run").folder
    killed = tmp_path / "killed" / "run"
    for moment in MOMENTS:
        die_in_a_child(plan, killed, lambda moment=moment: install_death(*moment))
    resumed = run_tiny(plan, killed)
    assert resumed.finished
    assert_same_run(resumed.folder, whole)


@pytest.mark.parametrize("style", ["nanochat", "gpt2"])
def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(tmp_path: Path, style) -> None:
    plan = tiny_plan(write_text(tmp_path / "text.txt"), style, steps=STEPS)
    whole = run_tiny(plan, tmp_path / "whole" / "run").folder
    killed, chance = tmp_path / "killed" / "run", random.Random(f"kills of {style}")
    for _ in range(NUM_RANDOM_KILLS):
        calls = chance.randint(1, LONGEST_RANDOM_LEG)
        exit_code = leg_in_a_child(plan, killed, lambda calls=calls: die_after_calls(calls))
        assert exit_code in (0, -signal.SIGKILL)
        if exit_code == 0:
            break
    assert_same_run(run_tiny(plan, killed).folder, whole)


def die_in_a_child(plan, path: Path, install: Callable[[], None]) -> None:
    assert leg_in_a_child(plan, path, install) == -signal.SIGKILL


def leg_in_a_child(plan, path: Path, install: Callable[[], None]) -> int:
    def leg() -> None:
        install()
        run_tiny(plan, path)

    return exit_code_of(fork(leg))


def install_death(owner: Any, name: str, number: int, when: str) -> None:
    """End this process, a child's, before or after the `number`-th call of a function."""
    call, left = getattr(owner, name), number

    def fatal(*arguments, **named):
        nonlocal left
        left -= 1
        if left == 0 and when == "before":
            die()
        result = call(*arguments, **named)
        if left == 0:
            die()
        return result

    setattr(owner, name, fatal)


def die_after_calls(number: int) -> None:
    """End this process, a child's, at its `number`-th call of a Python function."""
    left = number

    def count(frame, event: str, argument) -> None:
        nonlocal left
        left -= event == "call"
        if left <= 0:
            die()

    sys.setprofile(count)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def assert_same_run(resumed: RunFolder, whole: RunFolder, *, state: bool = True) -> None:
    """Weights, optimizer state, random state and every loss ever logged, to the bit.

    Without `state` but for state.json, which was written before the evaluation it would name.
    """
    newest = f"step-{STEPS:08d}"
    names = ["model.safetensors", "optimizer.safetensors", "state.json"]
    for name in names if state else names[:2]:
        ends = [(f.checkpoints / newest / name).read_bytes() for f in (resumed, whole)]
        assert ends[0] == ends[1], name
    assert curve(resumed) == curve(whole)
    assert [step for kind, step in curve(whole) if kind == "step"] == list(range(1, STEPS + 1))
    assert [step for kind, step in curve(whole) if kind == "evaluation"] == [3, 6, 9, 12]


def curve(folder: RunFolder) -> dict[tuple[str, int], set[float]]:
    """Every value that was logged for a step: one, however often the step was taken."""
    found = defaultdict(set)
    for line in folder.metrics():
        value = line["loss"] if line["kind"] == "step" else line["bits_per_byte"]
        found[line["kind"], line["step"]].add(value)
    assert all(len(values) == 1 for values in found.values()), found
    return dict(sorted(found.items()))

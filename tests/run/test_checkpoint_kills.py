"""A kill at any moment of a save costs nothing that was saved before it."""

from __future__ import annotations

import io
import os
import random
import select
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny_training import TinyTraining, exit_code_of, fork, loaded_step

from snugpt.run.checkpoint import remove_stale, save_checkpoint
from snugpt.run.manifest import damage

NUM_RANDOM_KILLS = 24
LONGEST_WAIT_S = 0.08  # some four saves
LEAST_KILL_POINTS = 100  # two per tensor and file, and those of syncs, renames and deletions


class KillPoints:
    """Counts the moments of a save and ends the process at one of them."""

    def __init__(self, fatal: int) -> None:
        self.left = fatal

    def passed(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def around(self, call):
        def watched(*arguments, **named):
            self.passed()
            result = call(*arguments, **named)
            self.passed()
            return result

        return watched

    def install(self) -> None:
        """Watch this process for good: it is a child that lives for one save."""
        os.fsync = lambda descriptor: None  # a kill, unlike a power cut, loses no written page
        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self.around(getattr(os, name)))
        points, open_file = self, Path.open

        class HalfWritten(io.FileIO):
            def write(self, content) -> int:
                middle = len(content) // 2
                super().write(content[:middle])
                points.passed()
                super().write(content[middle:])
                points.passed()
                return len(content)

        def opened(path: Path, mode: str = "r", *arguments, **named):
            if mode == "xb":
                return HalfWritten(path, "x")
            return open_file(path, mode, *arguments, **named)

        Path.open = opened


def three_steps(folder: Path) -> tuple[TinyTraining, dict[int, dict[str, torch.Tensor]]]:
    """Save steps 1 and 2; return the training at step 3 and the tensors of all three."""
    training, expected = TinyTraining(), {}
    for step in (1, 2, 3):
        training.take(1)
        expected[step] = {name: tensor.clone() for name, tensor in training.tensors().items()}
        if step < 3:
            save_checkpoint(folder, step, training.model, training.optimizers, {})
    return training, expected


def test_kill_at_every_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    training, expected = three_steps(tmp_path / "before")
    found: list[int] = []
    while True:
        folder = tmp_path / "run" / "checkpoints"
        shutil.copytree(tmp_path / "before", folder)

        def save_until_killed(folder: Path = folder) -> None:
            KillPoints(fatal=len(found)).install()
            save_checkpoint(folder, 3, training.model, training.optimizers, {})

        exit_code = exit_code_of(fork(save_until_killed))
        assert exit_code in (0, -signal.SIGKILL)
        found.append(loaded_step(folder, expected))
        remove_stale(folder)
        assert all(path.name.startswith("step-") for path in folder.iterdir())
        assert not any(damage(path) for path in folder.iterdir())
        shutil.rmtree(tmp_path / "run")
        if exit_code == 0:
            break
    assert len(found) > LEAST_KILL_POINTS
    assert set(found) == {2, 3}
    assert found == sorted(found)  # once the new one is there it stays


def test_kills_at_random_moments_lose_nothing_that_was_saved(tmp_path: Path) -> None:
    chance = random.Random(20)
    training = TinyTraining().take(1)
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, 1, training.model, training.optimizers, {})
    newest = 1
    for _ in range(NUM_RANDOM_KILLS):
        reader, writer = os.pipe()

        def save_for_ever(first: int = newest + 1, writer: int = writer) -> None:
            for step in range(first, first + 10_000):
                mark(training, step)
                save_checkpoint(folder, step, training.model, training.optimizers, {})
                os.write(writer, step.to_bytes(4, "little"))

        child = fork(save_for_ever)
        os.close(writer)
        select.select([], [], [], chance.uniform(0, LONGEST_WAIT_S))
        os.kill(child, signal.SIGKILL)
        assert exit_code_of(child) == -signal.SIGKILL
        with os.fdopen(reader, "rb") as pipe:
            reported = [int.from_bytes(step, "little") for step in iter(lambda: pipe.read(4), b"")]
        found = loaded_step(folder, Marked(training))
        assert max([newest, *reported]) <= found <= max([newest, *reported]) + 1
        newest = found
    assert newest > 10  # the kills left time to save


def mark(training: TinyTraining, step: int) -> dict[str, torch.Tensor]:
    """Fill every tensor of the training with its step's number."""
    for tensor in training.tensors().values():
        tensor.fill_(step)
    return training.tensors()


class Marked(dict):
    """What `mark` makes of any step; step 1 is the training as it was saved first."""

    def __init__(self, training: TinyTraining) -> None:
        first = {name: tensor.clone() for name, tensor in training.tensors().items()}
        super().__init__({1: first})

    def __missing__(self, step: int) -> dict[str, torch.Tensor]:
        return {name: torch.full_like(tensor, step) for name, tensor in self[1].items()}


@pytest.fixture(autouse=True)
def _one_thread():
    """Forks copy no worker threads, so there are none to miss."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

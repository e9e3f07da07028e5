"""Every damage to a checkpoint is found, said in one line, and stepped over."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_training import TinyTraining

from snugpt.errors import FailedError
from snugpt.run.checkpoint import load_newest, save_checkpoint

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MANIFEST = "MANIFEST.json"
ALL_FILES = [MODEL, OPTIMIZER, STATE, MANIFEST]
FLIPS_PER_FILE = 50


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 to 3, saved once."""
    folder = tmp_path_factory.mktemp("intact")
    training = TinyTraining()
    for step in (1, 2, 3):
        training.take(1)
        save_checkpoint(folder, step, training.model, training.optimizers, {"at": step}, keep=3)
    return folder


@pytest.fixture
def run(three_checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the three to damage."""
    return shutil.copytree(three_checkpoints, tmp_path / "checkpoints")


def step_of(run: Path, step: int) -> Path:
    return run / f"step-{step:08d}"


def assert_previous_is_loaded(run: Path, *, reason: str = "") -> None:
    warned: list[str] = []
    checkpoint = load_newest(run, warn=warned.append)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (2, {"at": 2})
    assert len(warned) == 1
    assert "\n" not in warned[0]
    assert "step-00000003 is damaged" in warned[0]
    assert "step-00000003.corrupt" in warned[0]
    assert reason in warned[0]
    assert not os.path.lexists(step_of(run, 3))
    assert os.path.lexists(run / "step-00000003.corrupt")


@pytest.mark.parametrize("name", ALL_FILES)
def test_bit_flips_anywhere_are_detected(run: Path, name: str) -> None:
    chance = random.Random(name)
    path = step_of(run, 3) / name
    whole = path.read_bytes()
    for _ in range(FLIPS_PER_FILE):
        place, bit = chance.randrange(len(whole)), chance.randrange(8)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        assert_previous_is_loaded(run)
        (run / "step-00000003.corrupt").rename(step_of(run, 3))
    path.write_bytes(whole)
    assert load_newest(run, warn=pytest.fail).step == 3


@pytest.mark.parametrize("name", ALL_FILES)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_truncation_is_detected(run: Path, name: str, part: float) -> None:
    path = step_of(run, 3) / name
    os.truncate(path, int(path.stat().st_size * part))
    reason = "is not a manifest" if name == MANIFEST else "bytes instead of"
    assert_previous_is_loaded(run, reason=reason)


@pytest.mark.parametrize("name", ALL_FILES)
def test_appended_bytes_are_detected(run: Path, name: str) -> None:
    with (step_of(run, 3) / name).open("ab") as file:
        file.write(b"\0")
    assert_previous_is_loaded(run, reason=name)


@pytest.mark.parametrize("name", ALL_FILES)
def test_missing_file_is_detected(run: Path, name: str) -> None:
    (step_of(run, 3) / name).unlink()
    assert_previous_is_loaded(run, reason=f"{name} is missing")


@pytest.mark.parametrize("name", ALL_FILES)
def test_file_of_another_step_is_detected(run: Path, name: str) -> None:
    exchange(step_of(run, 3) / name, step_of(run, 1) / name)
    assert_previous_is_loaded(run)


def test_files_exchanged_within_a_step_are_detected(run: Path) -> None:
    exchange(step_of(run, 3) / MODEL, step_of(run, 3) / OPTIMIZER)
    assert_previous_is_loaded(run, reason=MODEL)


def test_folder_under_another_step_is_detected(run: Path) -> None:
    exchange(step_of(run, 3), step_of(run, 1))
    assert_previous_is_loaded(run, reason="state.json is of step 1")


def linked_file(run: Path) -> None:
    path = step_of(run, 3) / MODEL
    path.rename(run / "elsewhere")
    path.symlink_to(run / "elsewhere")


def linked_manifest(run: Path) -> None:
    path = step_of(run, 3) / MANIFEST
    path.rename(run / "elsewhere")
    path.symlink_to(run / "elsewhere")


def linked_folder(run: Path) -> None:
    step_of(run, 3).rename(run / "elsewhere")
    step_of(run, 3).symlink_to(run / "elsewhere")


def path_in_the_manifest(run: Path) -> None:
    step_of(run, 3).joinpath(MODEL).rename(run / "elsewhere")
    path = step_of(run, 3) / MANIFEST
    path.write_text(path.read_text().replace(MODEL, "../elsewhere"))


def pipe_for_a_file(run: Path) -> None:
    (step_of(run, 3) / MODEL).unlink()
    os.mkfifo(step_of(run, 3) / MODEL)


def endless_manifest(run: Path) -> None:
    (step_of(run, 3) / MANIFEST).write_text("[" * 5_000_000)


def plain_file_for_a_folder(run: Path) -> None:
    step_of(run, 3).rename(run / "elsewhere")
    step_of(run, 3).write_text("")


def unknown_key_in_the_manifest(run: Path) -> None:
    path = step_of(run, 3) / MANIFEST
    path.write_text(path.read_text().replace('{"schema"', '{"more":1,"schema"'))


@pytest.mark.parametrize(
    ("trick", "reason"),
    [
        (linked_file, "is not a plain file"),
        (linked_manifest, "is not a manifest"),
        (linked_folder, "not a folder"),
        (path_in_the_manifest, "does not list"),
        (unknown_key_in_the_manifest, "is not a manifest"),
        (pipe_for_a_file, "is not a plain file"),
        (endless_manifest, "is not a manifest"),
        (plain_file_for_a_folder, "not a folder"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_trick_with_names_is_damage(run: Path, trick: Callable[[Path], None], reason: str) -> None:
    trick(run)
    assert_previous_is_loaded(run, reason=reason)


def test_second_damaged_folder_of_a_step_gets_a_number(run: Path) -> None:
    (run / "step-00000003.corrupt").mkdir()
    (step_of(run, 3) / MODEL).unlink()
    load_newest(run, warn=lambda line: None)
    assert (run / "step-00000003.corrupt-2").exists()


def test_two_damaged_ones_are_stepped_over(run: Path) -> None:
    (step_of(run, 3) / MODEL).unlink()
    (step_of(run, 2) / STATE).unlink()
    warned: list[str] = []
    assert load_newest(run, warn=warned.append).step == 1
    assert len(warned) == 2


def test_no_intact_checkpoint_is_an_error_that_says_what_was_tried(run: Path) -> None:
    for step in (1, 2, 3):
        (step_of(run, step) / MODEL).unlink()
    for _ in range(2):  # and a second start does not begin from nothing either
        with pytest.raises(FailedError) as caught:
            load_newest(run, warn=pytest.fail)
        error = caught.value
        assert error.exit_code == 1
        assert "\n" not in error.message
        for step in (1, 2, 3):
            assert f"step-0000000{step}: {MODEL} is missing" in error.message
        assert error.hint == f"mv {run} {run}.damaged"


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)

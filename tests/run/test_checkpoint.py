"""A checkpoint gives back what was saved, keeps what it should, and says no in one line."""

from __future__ import annotations

import errno
import os
import resource
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import TinyTraining, assert_same, exit_code_of, fork

from snugpt.errors import BadQuestionError, FailedError
from snugpt.model.adamw import AdamW
from snugpt.model.build import build_for_generation
from snugpt.run.checkpoint import (
    load_newest,
    remove_stale,
    restore,
    restore_weights,
    save_checkpoint,
)
from snugpt.spec.runtime import Runtime


def saved(folder: Path, training: TinyTraining, **state: object) -> Path:
    return save_checkpoint(folder, training.steps, training.model, training.optimizers, state)


def restored(folder: Path, training: TinyTraining) -> TinyTraining:
    checkpoint = load_newest(folder)
    assert checkpoint is not None
    restore(checkpoint, training.model, training.optimizers)
    training.steps = checkpoint.step
    return training


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("style", ["nanochat", "llama", "gpt2"])
def test_resumed_training_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path, style) -> None:
    torch.manual_seed(5)
    whole = TinyTraining(style).take(6)
    torch.manual_seed(5)
    saved(tmp_path, TinyTraining(style).take(3))
    torch.manual_seed(77)
    resumed = restored(tmp_path, TinyTraining(style, seed=99)).take(3)
    assert resumed.steps == 6
    assert_same(resumed.tensors(), whole.tensors())


def test_restoring_over_a_used_training_keeps_the_storage_of_every_tensor(tmp_path: Path) -> None:
    training = TinyTraining().take(2)
    saved(tmp_path, training)
    before = {name: tensor.clone() for name, tensor in training.tensors().items()}
    training.take(1)
    addresses = {name: tensor.data_ptr() for name, tensor in training.tensors().items()}
    restored(tmp_path, training)
    assert_same(training.tensors(), before)
    assert {n: t.data_ptr() for n, t in training.tensors().items()} == addresses


def test_checkpoint_before_the_first_step_clears_optimizer_state(tmp_path: Path) -> None:
    saved(tmp_path, TinyTraining())
    training = restored(tmp_path, TinyTraining().take(2))
    assert not any(optimizer.state for optimizer in training.optimizers)


def test_special_values_survive(tmp_path: Path) -> None:
    training = TinyTraining()
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    training.model.embedding.data[0, :4] = odd
    saved(tmp_path, training)
    row = restored(tmp_path, TinyTraining(seed=9)).model.embedding.data[0, :4]
    assert row.view(torch.int32).tolist() == odd.view(torch.int32).tolist()


def test_rates_come_from_the_recipe_and_not_from_the_file(tmp_path: Path) -> None:
    training = TinyTraining().take(1)
    saved(tmp_path, training)
    training.optimizers[0].param_groups[0]["lr"] = 0.125
    restored(tmp_path, training)
    assert training.optimizers[0].param_groups[0]["lr"] == 0.125


def test_state_returns_as_json_gives_it_back(tmp_path: Path) -> None:
    training = TinyTraining()
    saved(tmp_path, training, shape=training.shape, corpus_sha256="ab", position=[1, 0.1])
    state = load_newest(tmp_path).state
    assert state["corpus_sha256"] == "ab"
    assert state["position"] == [1, 0.1]
    assert state["shape"]["model_dim"] == 32


def test_safetensors_reads_the_files_by_name(tmp_path: Path) -> None:
    training = TinyTraining().take(1)
    folder = saved(tmp_path, training)
    assert_same(
        load_file(folder / "model.safetensors"),
        {name: weight.detach() for name, weight in training.model.named_parameters()},
    )
    moments = load_file(folder / "optimizer.safetensors")
    assert moments["adamw/embedding/exp_avg"].shape == (64, 32)
    assert moments["muon/blocks.1.query/momentum"].shape == (32, 32)
    assert moments["adamw/head/step"].item() == 1.0


def test_generation_reads_the_weights_alone_and_casts_them(tmp_path: Path) -> None:
    training = TinyTraining().take(1)
    folder = saved(tmp_path, training)
    (folder / "optimizer.safetensors").write_bytes(b"damaged")
    checkpoint = load_newest(tmp_path, weights_only=True)
    model = build_for_generation(
        training.shape, Runtime(device="cpu", attention="cpu"), "bf16", "cpu"
    )
    restore_weights(checkpoint, model)
    assert torch.equal(model.blocks[0].up, training.model.blocks[0].up.bfloat16())
    with pytest.raises(ValueError, match="weights_only"):
        restore(checkpoint, training.model, training.optimizers)


def test_generation_renames_nothing_beside_a_trainer(tmp_path: Path) -> None:
    training = TinyTraining()
    saved(tmp_path, training)
    (saved(tmp_path, training.take(1)) / "model.safetensors").write_bytes(b"damaged")
    warned: list[str] = []
    assert load_newest(tmp_path, warn=warned.append, weights_only=True).step == 0
    assert len(warned) == 1
    assert names(tmp_path) == ["step-00000000", "step-00000001"]


def test_reader_outlives_a_trainer_that_deletes_what_it_was_about_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TinyTraining()
    saved(tmp_path, training)
    listed = os.listdir
    overtaken = []

    def listed_too_early(folder: Path) -> list[str]:
        found = listed(folder)
        if not overtaken:
            overtaken.append(True)
            saved(tmp_path, training.take(1))
            shutil.rmtree(tmp_path / "step-00000000")
        return found

    monkeypatch.setattr(os, "listdir", listed_too_early)
    warned: list[str] = []
    assert load_newest(tmp_path, warn=warned.append, weights_only=True).step == 1
    assert overtaken
    assert not warned


def test_folder_without_checkpoints_gives_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "absent") is None
    (tmp_path / "notes.txt").write_text("x")
    assert load_newest(tmp_path) is None


def test_newest_two_are_kept(tmp_path: Path) -> None:
    training = TinyTraining()
    for _ in range(4):
        saved(tmp_path, training.take(1))
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_keep_one_leaves_only_the_one_just_written(tmp_path: Path) -> None:
    training = TinyTraining()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, training.model, training.optimizers, {}, keep=1)
    assert names(tmp_path) == ["step-00000002"]


def test_keep_below_one_is_a_bad_question(tmp_path: Path) -> None:
    training = TinyTraining()
    with pytest.raises(BadQuestionError, match="keep = 0"):
        save_checkpoint(tmp_path, 1, training.model, training.optimizers, {}, keep=0)


def test_damaged_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    training = TinyTraining()
    saved(tmp_path, training.take(1))
    (saved(tmp_path, training.take(1)) / "model.safetensors").write_bytes(b"damaged")
    saved(tmp_path, training.take(1))
    assert "step-00000001" in names(tmp_path)


def test_saved_step_is_not_written_again(tmp_path: Path) -> None:
    training = TinyTraining().take(1)
    folder = saved(tmp_path, training)
    inode = (folder / "model.safetensors").stat().st_ino
    assert saved(tmp_path, training) == folder
    assert (folder / "model.safetensors").stat().st_ino == inode


def test_damaged_step_is_written_again(tmp_path: Path) -> None:
    training = TinyTraining().take(1)
    (saved(tmp_path, training) / "state.json").unlink()
    saved(tmp_path, training)
    assert names(tmp_path) == ["step-00000001", "step-00000001.corrupt"]
    assert load_newest(tmp_path).step == 1


def test_folder_of_another_step_is_written_again(tmp_path: Path) -> None:
    training = TinyTraining().take(1)
    saved(tmp_path, training).rename(tmp_path / "step-00000002")
    saved(tmp_path, training.take(1))
    assert names(tmp_path) == ["step-00000002", "step-00000002.corrupt"]
    assert load_newest(tmp_path).step == 2


def test_temporary_folders_of_dead_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0123").mkdir()
    (tmp_path / ".tmp-0123" / "model.safetensors").write_bytes(b"half")
    remove_stale(tmp_path)
    assert names(tmp_path) == []
    (tmp_path / ".tmp-4567").mkdir()
    saved(tmp_path, TinyTraining())
    assert names(tmp_path) == ["step-00000000"]


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (lambda: TinyTraining(width=64), r"holds .* of shape .*, the model's is"),
        (lambda: TinyTraining("gpt2"), r"holds .*, which the model lacks"),
    ],
    ids=["other width", "other style"],
)
def test_checkpoint_of_another_model_is_refused_and_changes_nothing(
    tmp_path: Path, other, complaint: str
) -> None:
    saved(tmp_path, TinyTraining())  # no step taken: the weights alone must differ
    training = other()
    before = {name: tensor.clone() for name, tensor in training.tensors().items()}
    with pytest.raises(FailedError, match=complaint) as caught:
        restored(tmp_path, training)
    assert "\n" not in caught.value.message
    assert caught.value.hint.startswith("cat ")
    assert_same(training.tensors(), before)


def test_state_of_another_optimizer_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path, TinyTraining().take(1))
    training = TinyTraining(seed=9)
    training.optimizers = [AdamW(training.model.parameters())]
    before = {name: tensor.clone() for name, tensor in training.tensors().items()}
    with pytest.raises(FailedError, match=r"holds muon/.*momentum.*no optimizer"):
        restored(tmp_path, training)
    assert_same(training.tensors(), before)


def test_weights_of_another_dtype_are_not_cast_for_training(tmp_path: Path) -> None:
    saved(tmp_path, TinyTraining())
    training = TinyTraining()
    training.model.to(torch.bfloat16)
    with pytest.raises(FailedError, match="as F32"):
        restored(tmp_path, training)


def assert_old_one_stands(folder: Path) -> None:
    assert names(folder) == ["step-00000001"]
    assert load_newest(folder, warn=pytest.fail).step == 1


@pytest.mark.parametrize("failing_sync", range(8))
def test_full_disk_at_any_sync_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_sync: int
) -> None:
    """Four files, each forced to disk and then its folder: eight syncs before the last rename."""
    training = TinyTraining().take(1)
    saved(tmp_path, training)
    syncs = iter(range(100))
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if next(syncs) == failing_sync:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(FailedError, match=r"could not save step 2 .*No space left") as caught:
        saved(tmp_path, training.take(1))
    assert "\n" not in caught.value.message
    assert caught.value.hint == f"df -h {tmp_path}"
    assert_old_one_stands(tmp_path)


def test_limit_on_file_size_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    training = TinyTraining().take(1)
    saved(tmp_path, training)

    def save_beyond_the_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(FailedError, match=r"could not save step 2 .*File too large"):
            saved(tmp_path, training.take(1))

    assert exit_code_of(fork(save_beyond_the_limit)) == 0
    assert_old_one_stands(tmp_path)


def test_disk_too_small_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TinyTraining().take(1)
    saved(tmp_path, training)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("something was written"))
    with pytest.raises(FailedError, match=r"could not save step 2 .*disk needed, 1000 B free"):
        saved(tmp_path, training.take(1))
    assert_old_one_stands(tmp_path)


def test_ctrl_c_inside_a_save_leaves_no_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TinyTraining().take(1)
    saved(tmp_path, training)

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, training.take(1))
    assert_old_one_stands(tmp_path)


def test_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FailedError, match="could not save"):
        saved(tmp_path / "file", TinyTraining())
    with pytest.raises(FailedError, match="could not read"):
        load_newest(tmp_path / "file")


def test_hint_can_be_typed_when_the_path_has_a_space(tmp_path: Path) -> None:
    (tmp_path / "my run").write_bytes(b"")
    with pytest.raises(FailedError) as caught:
        load_newest(tmp_path / "my run")
    assert shlex.split(caught.value.hint) == ["ls", "-ld", str(tmp_path / "my run")]


def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        saved(tmp_path, TinyTraining(), odd=object())
    assert names(tmp_path) == []

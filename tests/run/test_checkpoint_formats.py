"""Weights and optimizer state on disk in every dtype: the same curve, or one line that says no."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import TinyTraining, assert_same

from snugpt.errors import FailedError
from snugpt.run.checkpoint import load_newest, restore, save_checkpoint

WIDTH = 64  # matrices of 4096 elements, the smallest that int8 takes
LEVERS = tuple(product(("fp32", "bf16", "int8"), ("master", "bf16")))


def tiny(state: str, weights: str, *, seed: int = 1, style="nanochat") -> TinyTraining:
    return TinyTraining(style, width=WIDTH, seed=seed, state_dtype=state, weight_dtype=weights)


def saved(folder: Path, training: TinyTraining) -> Path:
    return save_checkpoint(folder, training.steps, training.model, training.optimizers, {})


def restored(folder: Path, training: TinyTraining) -> TinyTraining:
    checkpoint = load_newest(folder)
    restore(checkpoint, training.model, training.optimizers)
    training.steps = checkpoint.step
    return training


@pytest.mark.parametrize("style", ["nanochat", "gpt2"])
@pytest.mark.parametrize(("state", "weights"), LEVERS)
def test_a_resumed_run_takes_the_same_steps_to_the_bit(tmp_path, state, weights, style):
    torch.manual_seed(5)
    whole = tiny(state, weights, style=style).take(5)
    torch.manual_seed(5)
    saved(tmp_path, tiny(state, weights, style=style).take(3))
    torch.manual_seed(77)
    resumed = restored(tmp_path, tiny(state, weights, style=style, seed=99)).take(2)
    assert_same(resumed.tensors(), whole.tensors())


@pytest.mark.parametrize(("state", "weights"), LEVERS)
def test_on_disk_everything_has_its_own_dtype(tmp_path, state, weights):
    folder = saved(tmp_path, tiny(state, weights).take(1))
    found = load_file(folder / "model.safetensors")
    stored = {"master": torch.float32, "bf16": torch.bfloat16}
    assert {tensor.dtype for tensor in found.values()} == {stored[weights]}
    moments = load_file(folder / "optimizer.safetensors")
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
    assert moments["adamw/head/exp_avg"].dtype == kinds[state]
    assert moments["muon/blocks.1.up/momentum"].dtype == kinds[state]
    scales = [name for name in moments if name.endswith("_scale")]
    assert bool(scales) == (state == "int8")
    for name in scales:
        assert moments[name].shape == (moments[name.removesuffix("_scale")].numel() // 256,)


@pytest.mark.parametrize(
    ("before", "after"),
    [(a, b) for a, b in product(LEVERS, LEVERS) if (a[0] == b[0]) != (a[1] == b[1])],
)
def test_one_other_dtype_is_refused_in_one_line_and_changes_nothing(tmp_path, before, after):
    saved(tmp_path, tiny(*before).take(1))
    training = tiny(*after, seed=9).take(1)
    kept = {name: tensor.clone() for name, tensor in training.tensors().items()}
    with pytest.raises(FailedError, match=r"checkpoint .* (holds|lacks) .*") as caught:
        restored(tmp_path, training)
    assert "\n" not in caught.value.message
    assert caught.value.hint.startswith("cat ")
    assert_same(training.tensors(), kept)

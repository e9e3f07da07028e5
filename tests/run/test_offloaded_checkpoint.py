"""State that lies on the host is saved and restored like any other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from small_model import random_batch, small_model, small_recipe, small_shape

from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import step
from snugpt.run.checkpoint import load_newest, restore, save_checkpoint

SHAPE = small_shape("nanochat", depth=2, width=64, vocab_size=300)


def training(offload: str):
    model = small_model(SHAPE)
    recipe = replace(small_recipe(2, 32), offload=offload)
    return model, optimizers_for(model, recipe), recipe


def take(training, numbers: range) -> None:
    model, optimizers, recipe = training
    for number in numbers:
        batch = random_batch(SHAPE, 2, 32, seed=number)
        step(model, optimizers, recipe, lambda _, batch=batch: batch)


@pytest.mark.parametrize("after", ["none", "optimizer"])
@pytest.mark.parametrize("before", ["none", "optimizer"])
def test_a_resumed_run_goes_on_to_the_bit_wherever_its_state_lay_before(before, after, tmp_path):
    straight = training("none")
    take(straight, range(4))
    first = training(before)
    take(first, range(2))
    save_checkpoint(tmp_path, 2, first[0], first[1], {})
    second = training(after)
    take(second, range(7, 8))  # what it did before it is restored is gone
    restore(load_newest(tmp_path), second[0], second[1])
    take(second, range(2, 4))
    pairs = zip(straight[0].parameters(), second[0].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)

"""The lever `offload = optimizer`: the same steps to the bit, and no copy used too early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from late_copies import LateCopies
from msgspec.structs import replace
from small_model import random_batch, small_model, small_recipe, small_shape
from torch import Tensor

from snugpt.estimate import updating
from snugpt.estimate.state_on_host import SMALLEST_MOVED_ELEMENTS
from snugpt.model import state_on_host
from snugpt.model.optimizers import optimizers_for
from snugpt.model.parameter_wise import ParameterWise
from snugpt.model.state_on_host import StateOnHost
from snugpt.model.step import step
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import STYLES, ModelShape

WIDE = {"width": 64, "vocab_size": 300}  # matrices of 4096 and 16384 elements: these move
Copies = Callable[[torch.device], LateCopies]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    """Copies that happen as late as may be, and parameters of up to 17 stretches."""
    copies = LateCopies()
    monkeypatch.setattr(state_on_host, "copies_for", lambda _: copies)
    monkeypatch.setattr(updating, "STRETCH_ELEMENTS", 1024)
    return copies


def recipe_of(offload: str, *, clips: bool = True, **levers: Any) -> TrainingRecipe:
    recipe = small_recipe(2, 32, optimizer=levers.pop("optimizer", "muon"), weight_decay=0.1)
    schedule = replace(recipe.schedule, clip_norm=1.0 if clips else 0.0)
    return replace(recipe, offload=offload, schedule=schedule, **levers)


def trained(
    shape: ModelShape, recipe: TrainingRecipe
) -> tuple[list[Tensor], list[ParameterWise], dict[str, Tensor]]:
    """Weights, optimizers and all their state after three steps."""
    model = small_model(shape)
    optimizers = optimizers_for(model, recipe)
    for number in range(3):
        batch = random_batch(shape, 2, 32, seed=number)
        step(model, optimizers, recipe, lambda _, batch=batch: batch)
    names = {weight: name for name, weight in model.named_parameters()}
    states = {
        f"{names[weight]}/{key}": tensor
        for optimizer in optimizers
        for weight, state in optimizer.state.items()
        for key, tensor in state.items()
    }
    return list(model.parameters()), optimizers, states


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("style", STYLES)
def test_steps_with_their_state_on_the_host_are_the_same_to_the_bit(style, optimizer, clips, late):
    shape = small_shape(style, depth=2, tie=style == "llama", **WIDE)
    asked = {"optimizer": optimizer, "clips": clips}
    weights, _, states = trained(shape, recipe_of("none", **asked))
    assert late.host_bytes == 0
    moved, _, on_host = trained(shape, recipe_of("optimizer", **asked))
    assert late.host_bytes > 0
    assert all(torch.equal(one, other) for one, other in zip(weights, moved, strict=True))
    assert states.keys() == on_host.keys()
    assert all(torch.equal(states[name], on_host[name]) for name in states)


@pytest.mark.parametrize("state_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_moments_of_fewer_bytes_move_to_the_same_bits(optimizer, state_dtype, late):
    if state_dtype == "int8":
        pytest.importorskip("torchao")
    shape = small_shape("llama", depth=2, **WIDE)
    asked = {"optimizer": optimizer, "state_dtype": state_dtype}
    weights, _, states = trained(shape, recipe_of("none", **asked))
    moved, _, on_host = trained(shape, recipe_of("optimizer", **asked))
    assert late.host_bytes > 0
    assert all(torch.equal(one, other) for one, other in zip(weights, moved, strict=True))
    assert all(torch.equal(states[name], on_host[name]) for name in states)


def test_each_byte_of_state_crosses_the_bus_twice_a_step_and_once_is_guessed_at_most(late):
    shape = small_shape("llama", depth=2, **WIDE)
    _, optimizers, _ = trained(shape, recipe_of("optimizer"))
    moving = [w for o in optimizers for w in o.state if w.numel() >= SMALLEST_MOVED_ELEMENTS]
    matrices = sum(w.numel() for w in moving if w in optimizers[0].state)
    others = sum(w.numel() for w in moving if w in optimizers[1].state)
    each_step = 4 * matrices + 8 * others
    assert late.host_bytes == 3 * each_step
    assert late.device_bytes == 3 * each_step


def test_what_follows_is_fetched_before_it_is_asked_for_from_the_second_step_on(late):
    shape = small_shape("llama", depth=2, **WIDE)
    waits: list[bool] = []  # whether what is waited for was asked for just now
    late.on_wait = lambda newest: waits.append(newest)
    trained(shape, recipe_of("optimizer"))
    third = waits[2 * len(waits) // 3 :]
    assert sum(third) < sum(waits[: len(third)])
    assert sum(third) <= 4  # the first of each optimizer; and the last, which nothing follows


def test_the_device_holds_counters_small_states_and_two_stages(late):
    shape = small_shape("llama", depth=2, **WIDE)
    _, optimizers, _ = trained(shape, recipe_of("optimizer", optimizer="adamw"))
    (adamw,) = optimizers
    assert isinstance(adamw.on_host, StateOnHost)
    assert [stage.buffer.numel() for stage in adamw.on_host.stages] == [2 * 1024 * 4] * 2
    norm = next(w for w in adamw.state if w.dim() == 1)
    assert not adamw.moves(norm)


def test_what_was_fetched_in_vain_is_fetched_again_in_the_next_step(late):
    """A checkpoint may have been restored in between."""
    on_host = StateOnHost(4096, torch.device("cpu"))
    one, other = torch.zeros(64, 64), torch.zeros(64, 64)
    states: list[dict[str, Tensor]] = [{}, {}]
    on_host.place((state, {"momentum": torch.zeros(64, 64)}) for state in states)

    def visit(weight: Tensor, state: dict[str, Tensor]) -> list[float]:
        return [s["momentum"][part][0].item() for _, s, part in on_host.stretches(weight, state)]

    for visited in ((0, 1), (0,)):  # the second time, what follows the first is not asked for
        for i in visited:
            visit((one, other)[i], states[i])
        on_host.end_step()
    states[1]["momentum"].fill_(3.0)
    assert visit(other, states[1]) == [3.0] * 4

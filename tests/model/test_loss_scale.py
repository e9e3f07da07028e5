"""The scaled loss of fp16: exact where nothing overflows, and no step where something does."""

from __future__ import annotations

import msgspec
import pytest
import torch
from loss_curves import mean_loss
from small_model import random_batch, small_recipe, small_shape
from torch import Tensor

from snugpt.model import loss_scale
from snugpt.model.build import build_for_training
from snugpt.model.gpt import GPT
from snugpt.model.loss_scale import START, LossScale
from snugpt.model.muon import Muon
from snugpt.model.optimizers import optimizers_for
from snugpt.model.parameter_wise import ParameterWise
from snugpt.model.step import step
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime

LARGEST_CHANGE = 0.004  # of the mean loss of three seeds
BATCH, SEQ_LEN = 2, 16
CPU = torch.device("cpu")
FORMATS = pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["muon", "adamw"])
CLIPPING = pytest.mark.parametrize("clip_norm", [0.0, 0.01, 1.0])


class Training:
    """A model with its optimizers, the same every time; `dtype` is what it computes in."""

    def __init__(
        self, optimizer: str = "muon", clip_norm: float = 1.0, dtype: str = "fp16", **levers: str
    ) -> None:
        shape = small_shape("nanochat", depth=2, width=64)
        recipe = small_recipe(BATCH, SEQ_LEN, accumulation=2, optimizer=optimizer, weight_decay=0.1)
        schedule = msgspec.structs.replace(recipe.schedule, clip_norm=clip_norm)
        self.recipe: TrainingRecipe = msgspec.structs.replace(
            recipe, schedule=schedule, compute_dtype=dtype, **levers
        )
        runtime = Runtime(device="cpu", attention="cpu")
        self.model: GPT = build_for_training(shape, self.recipe, runtime, seed=0)
        self.optimizers: list[ParameterWise] = optimizers_for(self.model, self.recipe)
        self.batch = random_batch(shape, BATCH, SEQ_LEN)

    def step(self) -> float:
        return step(self.model, self.optimizers, self.recipe, lambda _: self.batch).item()

    def tensors(self) -> list[Tensor]:
        """Copies of all weights and of all that the optimizers keep, as it is read."""
        kept: list[Tensor] = []
        for optimizer in self.optimizers:
            for weight, state in optimizer.state.items():
                moments = state.keys() & {"momentum", "exp_avg", "exp_avg_sq"}
                whole = slice(0, weight.numel())
                kept += [optimizer.formats[weight].read(state, name, whole) for name in moments]
                kept += [state[name] for name in state.keys() & {"step"}]
        return [tensor.clone() for tensor in (*self.model.parameters(), *kept)]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@CLIPPING
@OPTIMIZERS
@FORMATS
def test_a_scale_changes_no_step_that_does_not_overflow(state_dtype, optimizer, clip_norm):
    plain = Training(optimizer, clip_norm, "fp32", state_dtype=state_dtype)
    scaled = Training(optimizer, clip_norm, "fp32", state_dtype=state_dtype)
    scaled.model.loss_scale = LossScale(CPU)
    for _ in range(3):
        assert scaled.step() == pytest.approx(plain.step(), rel=1e-5)
    assert scaled.model.loss_scale.numbers() == [START, 3, 0]
    for ours, theirs in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5)


@OPTIMIZERS
@FORMATS
def test_after_an_overflow_nothing_moves_and_the_scale_is_halved(state_dtype, optimizer):
    training = Training(optimizer, state_dtype=state_dtype)
    scale = training.model.loss_scale
    loss = training.step()
    before = training.tensors()
    too_large = 2.0**40
    scale.scale.fill_(too_large)
    skipped_loss = training.step()
    assert same(before, training.tensors())
    assert scale.numbers() == [too_large / 2, 0, 1]
    assert 0 < skipped_loss < 2 * loss  # the loss itself is as always
    scale.scale.fill_(START)
    training.step()
    assert not same(before, training.tensors())
    assert scale.numbers() == [START, 1, 1]


@OPTIMIZERS
@FORMATS
def test_the_first_step_may_be_the_one_that_is_not_taken(state_dtype, optimizer):
    training = Training(optimizer, state_dtype=state_dtype)
    weights = [weight.clone() for weight in training.model.parameters()]
    training.model.loss_scale.scale.fill_(2.0**40)
    training.step()
    assert same(weights, list(training.model.parameters()))
    training.model.loss_scale.scale.fill_(START)
    training.step()
    assert not same(weights, list(training.model.parameters()))
    assert all(tensor.float().isfinite().all() for tensor in training.tensors())


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_one_bad_number_in_one_gradient_is_enough(bad, clip_norm):
    training = Training(clip_norm=clip_norm)
    training.step()
    before = training.tensors()
    first = next(iter(training.model.parameters()))

    def spoil(grad: Tensor) -> Tensor:
        grad.view(-1)[0] = bad
        return grad

    first.register_hook(spoil)
    training.step()
    assert same(before, training.tensors())
    assert training.model.loss_scale.numbers() == [START / 2, 0, 1]


def test_gradients_are_unscaled_and_clipped_by_one_factor():
    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.tensor([3.0, 4.0]) * START
    loss = torch.tensor(2.0 * START)
    LossScale(CPU).settle([weight], 1.0, [], loss)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))
    assert loss.item() == 2.0


def test_the_scale_doubles_after_enough_good_steps(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 2)
    training = Training()
    scales = []
    for _ in range(4):
        training.step()
        scales.append(training.model.loss_scale.numbers()[0])
    assert scales == [START, 2 * START, 2 * START, 4 * START]


def test_what_it_holds_goes_into_numbers_and_back():
    one, other = LossScale(CPU), LossScale(CPU)
    one.put_back([2.0**20, 7, 3])
    other.put_back(one.numbers())
    assert other.numbers() == [2.0**20, 7, 3]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_dtypes_have_no_scale(dtype):
    training = Training(dtype=dtype)
    training.step()
    assert training.model.loss_scale is None
    assert all(optimizer.taken is None for optimizer in training.optimizers)


def test_a_model_learns_as_well_as_in_fp32():
    assert mean_loss(compute_dtype="fp16") == pytest.approx(mean_loss(), rel=LARGEST_CHANGE)


def test_muon_in_fp16_does_not_lose_gradients_below_its_range():
    matrix = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) * 2e-6
    moved = []
    for dtype in (torch.float16, torch.float32):
        weight = torch.zeros(16, 32, requires_grad=True)
        weight.grad = matrix.clone()
        Muon([weight], lr=1.0, dtype=dtype).step()
        moved.append(weight.detach())
    torch.testing.assert_close(*moved, rtol=0, atol=0.02)
    assert moved[0].norm() > 1

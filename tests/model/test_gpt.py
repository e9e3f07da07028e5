"""The whole model in every style against plain PyTorch, and what must not change its gradients."""

from __future__ import annotations

import pytest
import reference
import torch
from small_model import random_batch, small_model, small_recipe, small_shape
from torch import Tensor

from snugpt.model.gpt import GPT
from snugpt.model.step import Batch, evaluate_batch, micro_batch, no_mark
from snugpt.spec.shape import STYLES, ModelShape

PAST_THE_WINDOW = 150  # of 128 tokens at a context of 256


def gradients(model: GPT, batch: Batch, scale: float = 0.01, chunk: int = 50) -> dict[str, Tensor]:
    recipe = small_recipe(*batch[0].shape, chunk=chunk)
    model.zero_grad()
    micro_batch(model, recipe, batch, scale, no_mark)
    return {name: weight.grad for name, weight in model.named_parameters()}


def assert_close_each(got: dict[str, Tensor], wanted: dict[str, Tensor], share: float) -> None:
    assert got.keys() == wanted.keys()
    for name, right in wanted.items():
        highest = right.abs().max().item()
        assert highest > 0, name
        off = (got[name] - right).abs().max().item() / highest
        assert off < share, (name, off)


def shapes() -> list[ModelShape]:
    own = [small_shape(style) for style in STYLES]
    all_heads = [small_shape(style, kv_heads=2) for style in STYLES]
    tied_otherwise = [small_shape(style, tie=style != "gpt2") for style in STYLES]
    return own + all_heads + tied_otherwise + [small_shape("nanochat", window_pattern="S")]


def label(shape: ModelShape) -> str:
    return f"{shape.style}-kv{shape.num_kv_heads}-tied{shape.tied_embeddings}"


@pytest.mark.parametrize("shape", shapes(), ids=label)
def test_loss_and_every_gradient_are_those_of_plain_pytorch(shape):
    model = small_model(shape)
    tokens, targets = random_batch(shape, 2, PAST_THE_WINDOW)
    weights = {n: w.detach().double().requires_grad_() for n, w in model.named_parameters()}
    wanted = reference.mean_loss(weights, shape, tokens, targets)
    wanted.backward()
    loss = model.loss(model.hidden(tokens), targets, chunk=64, scale=1 / targets.numel())
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    ours = {name: weight.grad for name, weight in model.named_parameters()}
    assert_close_each(ours, {n: w.grad.float() for n, w in weights.items()}, 1e-4)


@pytest.mark.parametrize("style", STYLES)
def test_the_evaluations_mean_is_the_loss(style):
    shape = small_shape(style)
    model, batch = small_model(shape), random_batch(shape, 2, 30)
    losses = evaluate_batch(model.eval(), small_recipe(2, 30), batch)
    weights = dict(model.named_parameters())
    assert losses.shape == (60,)
    assert losses.mean().item() == pytest.approx(
        reference.mean_loss(weights, shape, *batch).item(), rel=1e-5
    )


@pytest.mark.parametrize("style", STYLES)
def test_four_micro_batches_of_two_give_the_gradients_of_one_of_eight(style):
    shape = small_shape(style)
    model, (tokens, targets) = small_model(shape), random_batch(shape, 8, 20)
    whole = gradients(model, (tokens, targets))
    model.zero_grad()
    for rows in torch.arange(8).split(2):
        batch = tokens[rows], targets[rows]
        micro_batch(model, small_recipe(2, 20), batch, 0.01, no_mark)
    summed = {name: weight.grad for name, weight in model.named_parameters()}
    assert_close_each(summed, whole, 1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("style", STYLES)
def test_checkpointed_blocks_give_the_same_gradients_to_the_bit(style, dropout):
    shape = small_shape(style, dropout=dropout, kv_heads=2)
    model, batch = small_model(shape).train(), random_batch(shape, 2, PAST_THE_WINDOW)
    found = []
    for recompute in (False, True):
        model.recompute_blocks = recompute
        torch.manual_seed(7)
        found.append(gradients(model, batch))
    for name, right in found[0].items():
        assert torch.equal(found[1][name], right), name


def test_dropout_works_in_training_only():
    shape = small_shape("gpt2", dropout=0.3, kv_heads=2)
    model, (tokens, _) = small_model(shape), random_batch(shape, 2, 20)
    with torch.no_grad():
        assert not torch.equal(model.train().hidden(tokens), model.hidden(tokens))
        assert torch.equal(model.eval().hidden(tokens), model.hidden(tokens))


@pytest.mark.parametrize("style", STYLES)
def test_a_later_token_changes_nothing_before_it(style):
    shape = small_shape(style)
    model, (tokens, _) = small_model(shape), random_batch(shape, 1, 40)
    changed = tokens.clone()
    changed[0, 25] = (changed[0, 25] + 1) % shape.vocab_size
    with torch.no_grad():
        before, after = model.hidden(tokens), model.hidden(changed)
    assert torch.equal(before[:25], after[:25])
    assert not torch.equal(before[25:], after[25:])


@pytest.mark.parametrize("style", STYLES)
def test_bf16_on_the_cpu_stays_near_fp32(style):
    shape = small_shape(style)
    batch = random_batch(shape, 2, PAST_THE_WINDOW)
    losses = []
    for dtype in ("fp32", "bf16"):
        model = small_model(shape, dtype=dtype)
        losses.append(micro_batch(model, small_recipe(2, 150), batch, 1 / 300, no_mark).item())
        assert all(w.grad.dtype == torch.float32 for w in model.parameters())
        assert all(w.grad.isfinite().all() for w in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)

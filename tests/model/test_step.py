"""One optimisation step: its phases, its mean, and that steps learn."""

from __future__ import annotations

import msgspec
import pytest
import torch
from small_model import random_batch, small_model, small_recipe, small_shape

from snugpt.model.build import build, build_for_training
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import step
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES

CPU = Runtime(device="cpu", attention="cpu")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("style", STYLES)
def test_training_on_a_repeated_batch_lowers_the_loss(style, optimizer):
    shape = small_shape(style, depth=2, context_len=32)
    model = build(shape, Runtime(device="cpu", attention="cpu"), seed=0)
    recipe = small_recipe(4, 32, optimizer=optimizer, learning_rate=3e-3)
    optimizers = optimizers_for(model, recipe)
    batch = random_batch(shape, 4, 32)
    losses = [step(model, optimizers, recipe, lambda _: batch).item() for _ in range(25)]
    assert losses[0] == pytest.approx(torch.tensor(90.0).log().item(), rel=0.1)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("style", STYLES)
def test_a_step_of_four_micro_batches_moves_the_weights_as_one_of_all_rows(style):
    shape = small_shape(style)
    tokens, targets = random_batch(shape, 8, 20)
    moved = []
    for accumulation in (1, 4):
        model, batch = small_model(shape), 8 // accumulation
        recipe = small_recipe(batch, 20, accumulation=accumulation)
        rows = torch.arange(8).split(batch)
        loss = step(
            model,
            optimizers_for(model, recipe),
            recipe,
            lambda i, rows=rows: (tokens[rows[i]], targets[rows[i]]),
        )
        moved.append([loss, *(w.detach() for w in model.parameters())])
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-4)


def test_phases_are_named_in_order_and_gradients_are_gone_afterwards():
    shape = small_shape("llama")
    model, recipe = small_model(shape), small_recipe(2, 16, accumulation=2)
    marks: list[str] = []
    optimizers = optimizers_for(model, recipe)
    step(model, optimizers, recipe, lambda _: random_batch(shape, 2, 16), marks.append)
    assert marks == [*(2 * ["forward", "loss", "backward"]), "clip", "optimizer"]
    assert all(weight.grad is None for weight in model.parameters())


class Seen:
    """How many gradients exist while a parameter is updated, and in which order that is."""

    def __init__(self, model, optimizers) -> None:
        self.names, self.alive = [], []
        name_of = {weight: name for name, weight in model.named_parameters()}
        for optimizer in optimizers:
            optimizer.update = self.watched(optimizer.update, name_of)

    def watched(self, update, name_of):
        def seen(weight, group):
            self.names.append(name_of[weight])
            self.alive.append(sum(w.grad is not None for w in name_of))
            update(weight, group)

        return seen


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
@pytest.mark.parametrize("style", STYLES)
def test_updates_in_backward_hold_one_gradient_and_move_the_weights_as_all_at_once(
    style, checkpoint, tied
):
    shape = small_shape(style, tie=tied)
    each = small_recipe(2, 16, clip_norm=0.0, checkpoint=checkpoint)
    together = msgspec.structs.replace(
        each, schedule=msgspec.structs.replace(each.schedule, clip_norm=1e3)
    )
    assert each.steps_in_backward
    assert not together.steps_in_backward
    moved, marks, seen = [], [], None
    for recipe in (each, together):
        model = small_model(shape)
        model.recompute_blocks = checkpoint == "blocks"
        optimizers = optimizers_for(model, recipe)
        if recipe is each:
            seen = Seen(model, optimizers)
        losses = [
            step(model, optimizers, recipe, lambda _, i=i: random_batch(shape, 2, 16, i))
            for i in range(3)
        ]
        step(model, optimizers, recipe, lambda _: random_batch(shape, 2, 16), marks.append)
        moved.append([*losses, *model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*moved, strict=True))
    assert marks[:4] == ["forward", "loss", "backward", "forward"]
    assert set(seen.alive) == {1}
    assert len(seen.names) == 4 * len(list(small_model(shape).parameters()))
    assert seen.names[-1] == "embedding"


@pytest.mark.parametrize("weights", ["master", "bf16"])
@pytest.mark.parametrize("state", ["bf16", "int8"])
def test_low_bit_updates_are_the_same_in_backward_and_after_it(state, weights):
    shape = small_shape("nanochat", width=64, vocab_size=300)
    each = small_recipe(2, 16, clip_norm=0.0, state_dtype=state, weight_dtype=weights)
    together = msgspec.structs.replace(
        each, schedule=msgspec.structs.replace(each.schedule, clip_norm=1e3)
    )
    moved = []
    for recipe in (each, together):
        model = build_for_training(shape, recipe, CPU, seed=0)
        optimizers = optimizers_for(model, recipe)
        for i in range(3):
            step(model, optimizers, recipe, lambda _, i=i: random_batch(shape, 2, 16, i))
        moved.append(list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*moved, strict=True))


@pytest.mark.parametrize("style", STYLES)
def test_gradients_of_bf16_weights_are_those_of_fp32_rounded(style):
    """Computed in fp32 from the same values, so that only the last rounding is left."""
    shape, gradients = small_shape(style), []
    recipe = small_recipe(2, 40, weight_dtype="bf16")
    low = build_for_training(shape, recipe, CPU, seed=0)
    for weight in low.parameters():  # the product's own start has zeros
        source = torch.Generator().manual_seed(weight.numel())
        weight.data.copy_(torch.randn(weight.shape, generator=source) * 0.15)
    exact = build(shape, CPU)
    for model in (low, exact):
        for mine, theirs in zip(model.parameters(), low.parameters(), strict=True):
            mine.data.copy_(theirs)
        tokens, targets = random_batch(shape, 2, 40)
        model.loss(model.hidden(tokens), targets, chunk=16, scale=1.0).backward()
        gradients.append({name: w.grad for name, w in model.named_parameters()})
    for name, grad in gradients[0].items():
        assert grad.dtype == torch.bfloat16
        assert grad.any(), name
        if not (shape.tied_embeddings and name == "embedding"):  # a sum of two, each rounded
            assert torch.equal(grad, gradients[1][name].bfloat16()), name
    torch.testing.assert_close(
        gradients[0]["embedding"].float(), gradients[1]["embedding"], rtol=0.02, atol=0.02
    )


def test_without_clipping_accumulated_gradients_meet_the_optimizers_together():
    shape = small_shape("llama")
    model, recipe = small_model(shape), small_recipe(2, 16, accumulation=2, clip_norm=0.0)
    optimizers, marks = optimizers_for(model, recipe), []
    seen = Seen(model, optimizers)
    step(model, optimizers, recipe, lambda _: random_batch(shape, 2, 16), marks.append)
    assert marks == [*(2 * ["forward", "loss", "backward"]), "optimizer"]
    assert set(seen.alive) == {len(list(model.parameters()))}


def test_gradients_are_clipped_to_the_norm_of_the_schedule():
    shape = small_shape("llama")
    model, recipe = small_model(shape), small_recipe(2, 16)
    norms: list[float] = []

    class Watching(torch.optim.Optimizer):
        def step(self, closure=None) -> None:
            grads = [w.grad.flatten() for w in model.parameters()]
            norms.append(torch.cat(grads).norm().item())

    watching = Watching(model.parameters(), {})
    step(model, [watching], recipe, lambda _: random_batch(shape, 2, 16))
    assert norms == [pytest.approx(1.0, rel=1e-4)]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    shape = small_shape("nanochat")
    runtime = Runtime(device="cpu", attention="cpu")
    first, again, other = (build(shape, runtime, seed=seed) for seed in (1, 1, 2))
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.embedding, other.embedding)


def test_the_plain_loss_makes_all_logits_at_once_whatever_the_chunk_says(monkeypatch):
    from snugpt.model import loss

    shape = small_shape("gpt2")
    model, recipe = small_model(shape), small_recipe(2, 40, chunk=8)
    rows: list[int] = []
    capped = loss.capped_logits

    def seen(h, *rest):
        rows.append(h.shape[0])
        return capped(h, *rest)

    monkeypatch.setattr(loss, "capped_logits", seen)
    for name in ("chunked", "plain"):
        asked = msgspec.structs.replace(recipe, loss=name)
        step(model, optimizers_for(model, asked), asked, lambda _: random_batch(shape, 2, 40))
    assert rows == [*(10 * [8]), 80]

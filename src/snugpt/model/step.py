"""One optimisation step with named phases: training, tracing and probing all call this."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from snugpt.model.gpt import GPT
from snugpt.model.parameter_wise import ParameterWise
from snugpt.spec.memory import Phase
from snugpt.spec.recipe import TrainingRecipe

Batch = tuple[Tensor, Tensor]  # tokens and targets, (B, T) int64 each
Mark = Callable[[Phase], None]


def no_mark(phase: Phase) -> None:
    """Ignore the name of the phase that begins."""


def step(
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: TrainingRecipe,
    batch_of: Callable[[int], Batch],
    mark: Mark = no_mark,
) -> Tensor:
    """Take one optimizer step; return the mean cross-entropy of its tokens in nats, ().

    `batch_of(i)` gives the i-th micro-batch; `mark(phase)` is called as each phase begins. Nothing
    here waits for the device. Where `recipe.steps_in_backward` the updates are part of backward.
    """
    total = torch.zeros((), device=model.embedding.device)
    scale = 1 / recipe.total_batch_tokens  # of all ranks, so that sums over them are means
    if model.loss_scale is not None:
        scale = model.loss_scale.scale * scale
    if recipe.steps_in_backward:
        mark("forward")
        with updated_in_backward(optimizers):
            total += micro_batch(model, recipe, batch_of(0), scale, mark)
    else:
        for micro_step in range(recipe.grad_accum_steps):
            mark("forward")
            total += micro_batch(model, recipe, batch_of(micro_step), scale, mark)
        settles = recipe.clips or model.loss_scale is not None
        mark("clip" if settles else "optimizer")
        model.ranks.reduce(model, total)
        if model.loss_scale is not None:
            clip_norm = recipe.schedule.clip_norm
            model.loss_scale.settle(model.parameters(), clip_norm, optimizers, total)
        elif recipe.clips:
            model.ranks.clip(model, recipe.schedule.clip_norm)
        if settles:
            mark("optimizer")
    for optimizer in optimizers:
        optimizer.step()  # of the gradients that are there
    model.ranks.spread(model)
    model.zero_grad(set_to_none=True)
    return total


@contextmanager
def updated_in_backward(optimizers: Sequence[ParameterWise]) -> Iterator[None]:
    """Within the block each parameter is updated as soon as backward has completed its gradient.

    The gradient is let go before the next one is made: of a tied embedding after both its uses.
    """
    hooks = [
        weight.register_post_accumulate_grad_hook(partial(update_and_let_go, optimizer, group))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for weight in group["params"]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def update_and_let_go(optimizer: ParameterWise, group: dict[str, Any], weight: Tensor) -> None:
    optimizer.update(weight, group)
    weight.grad = None


def micro_batch(
    model: GPT, recipe: TrainingRecipe, batch: Batch, scale: float | Tensor, mark: Mark
) -> Tensor:
    """Forward and backward of one micro-batch; its tensors are gone when this returns."""
    tokens, targets = batch
    h = model.hidden(tokens)
    mark("loss")
    loss = model.loss(h, targets, chunk=rows_of_logits(recipe), scale=scale)
    del h
    mark("backward")
    loss.backward()
    return loss.detach()


@torch.no_grad()
def evaluate_batch(model: GPT, recipe: TrainingRecipe, batch: Batch) -> Tensor:
    """The cross-entropy of each token of one batch in nats, (B * T,)."""
    tokens, targets = batch
    return model.token_losses(model.hidden(tokens), targets, chunk=rows_of_logits(recipe))


def rows_of_logits(recipe: TrainingRecipe) -> int:
    """Rows of logits that exist at once."""
    return recipe.chunk_tokens or recipe.micro_batch_tokens

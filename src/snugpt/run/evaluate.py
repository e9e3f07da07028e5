"""Bits per byte on the validation text: the loss that does not depend on the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from snugpt.data.loader import ValidationLoader
from snugpt.model.gpt import GPT
from snugpt.model.step import evaluate_batch
from snugpt.spec.recipe import TrainingRecipe


def bits_per_byte(
    model: GPT,
    recipe: TrainingRecipe,
    loader: ValidationLoader,
    token_bytes: np.ndarray,
    stop: Callable[[], bool] = lambda: False,
    sums: Callable[..., tuple[float, ...]] = lambda *numbers: numbers,
) -> float | None:
    """Nats of all predicted tokens, as bits, over the bytes of text they stand for.

    With several ranks `sums` adds up what each has counted, and `stop` says the same to all.
    Tokens that stand for no text (separators) count neither way. None if `stop` said so on the way.
    """
    nats, num_bytes = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for number in range(loader.num_rounds):
            if stop():
                return None
            batch = loader.batch(number)
            if number >= loader.num_batches:  # other ranks have one more and need this one
                evaluate_batch(model, recipe, batch)
                continue
            losses = evaluate_batch(model, recipe, batch).double().cpu()
            lengths = torch.from_numpy(token_bytes[batch.targets.cpu().numpy().reshape(-1)])
            nats += float(losses[lengths > 0].sum())
            num_bytes += int(lengths.sum())
    finally:
        model.train(was_training)
    nats, num_bytes = sums(nats, num_bytes)
    return nats / math.log(2) / max(1, num_bytes)

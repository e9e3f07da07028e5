"""Loss curves of a small model on the built-in corpus: what a lever that is not exact changes."""

from __future__ import annotations

import sysconfig
from functools import cache
from itertools import islice
from pathlib import Path

import msgspec
import torch
from small_model import small_recipe, small_shape
from torch import Tensor

from snugpt.data.builtin import builtin_documents
from snugpt.model.build import build_for_training
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import Batch, step
from snugpt.spec.runtime import Runtime

SEEDS = (0, 1, 2)
STEPS, LAST = 30, 10
BATCH, SEQ_LEN = 8, 32


@cache
def corpus() -> Tensor:
    """The first documents of the built-in corpus, one token per ASCII character."""
    documents = islice(builtin_documents(Path(sysconfig.get_path("stdlib"))), 40)
    return torch.tensor(list("".join(documents).encode("ascii", "ignore")), dtype=torch.int64)


@cache
def last_loss(seed: int, **levers: str) -> float:
    """The mean loss of the last steps of a short run, in nats; the same text for every lever."""
    shape = small_shape("nanochat", depth=2, width=32, vocab_size=128, context_len=SEQ_LEN)
    recipe = msgspec.structs.replace(small_recipe(BATCH, SEQ_LEN, chunk=512), **levers)
    runtime = Runtime(device="cpu", attention="cpu", num_threads=torch.get_num_threads())
    model = build_for_training(shape, recipe, runtime, seed=seed)
    optimizers = optimizers_for(model, recipe)
    draw, text = torch.Generator().manual_seed(seed), corpus()

    def batch_of(_: int) -> Batch:
        starts = torch.randint(len(text) - SEQ_LEN, (BATCH, 1), generator=draw)
        rows = text[starts + torch.arange(SEQ_LEN + 1)]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    losses = [step(model, optimizers, recipe, batch_of).item() for _ in range(STEPS)]
    return sum(losses[-LAST:]) / LAST


def mean_loss(**levers: str) -> float:
    """`last_loss` over the seeds."""
    return sum(last_loss(seed, **levers) for seed in SEEDS) / len(SEEDS)

"""Batches from a token stream: which rows a step sees is a pure function of (seed, step).

A row is seq_len + 1 tokens; the next one begins seq_len later, so every token but the first is a
target once per epoch. Nothing is kept between calls: to resume a run is to know its step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from snugpt.data.row_order import RowOrder


class Batch(NamedTuple):
    """Token ids and the ids that follow them; both (B, T) int64, contiguous."""

    inputs: torch.Tensor
    targets: torch.Tensor


def num_rows(num_tokens: int, seq_len: int) -> int:
    """Return how many rows a stream holds; 0 if it is not longer than seq_len tokens."""
    return max(0, num_tokens - 1) // seq_len


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLoader:
    """Batches of training; step s takes positions [s * R, (s + 1) * R) of the row order.

    R = grad_accum_steps x world_size x device_batch_size. Any other division of R gives a step the
    same rows: accumulating 4 x 2 rows sees what one batch of 8 sees.
    """

    tokens: np.ndarray
    seq_len: int
    seed: int
    device_batch_size: int
    grad_accum_steps: int = 1
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        assert self.num_rows >= 1, "prepare() refuses a corpus shorter than one row"
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return num_rows(len(self.tokens), self.seq_len)

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimisation step, over all ranks and micro-steps."""
        return self.grad_accum_steps * self.world_size * self.device_batch_size

    def epochs(self, step: int) -> float:
        """Return how many times the stream has been seen before `step` begins."""
        return step * self.rows_per_step / self.num_rows

    def batch(self, step: int, micro_step: int = 0) -> Batch:
        """Return this rank's batch of one micro-step.

        Allocates on the device exactly two tensors of B x T x 8 bytes: inputs, then targets.
        """
        assert 0 <= micro_step < self.grad_accum_steps, (micro_step, self.grad_accum_steps)
        slot = (step * self.grad_accum_steps + micro_step) * self.world_size + self.rank
        order = RowOrder(num_rows=self.num_rows, seed=self.seed)
        rows = order.rows(slot * self.device_batch_size, self.device_batch_size)
        return _gather(self.tokens, self.seq_len, rows, self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationLoader:
    """Batches of validation: rows in the order of the text, each once, the same at every call.

    `max_rows` bounds how many are used. The last batches may be shorter, so that the rows that
    count do not depend on the batch size; with several ranks each takes its own batches.
    """

    tokens: np.ndarray
    seq_len: int
    device_batch_size: int
    max_rows: int | None = None
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"

    @property
    def num_rows(self) -> int:
        """Rows used, over all ranks."""
        available = num_rows(len(self.tokens), self.seq_len)
        return available if self.max_rows is None else min(available, self.max_rows)

    @property
    def num_batches(self) -> int:
        """Batches of this rank."""
        total = -(-self.num_rows // self.device_batch_size)
        return max(0, -(-(total - self.rank) // self.world_size))

    @property
    def num_rounds(self) -> int:
        """Batches of the rank that has the most: so often all ranks work together."""
        return -(-self.num_rows // (self.device_batch_size * self.world_size))

    def batch(self, number: int) -> Batch:
        """Return batch `number` of this rank; allocates inputs, then targets, like training.

        In a last round without a batch of its own a rank gets the first of all, not to be counted.
        """
        assert 0 <= number < self.num_rounds, (number, self.num_rounds)
        own = number < self.num_batches
        first = (number * self.world_size + self.rank) * self.device_batch_size if own else 0
        rows = np.arange(first, min(first + self.device_batch_size, self.num_rows))
        return _gather(self.tokens, self.seq_len, rows, self.device)


def _gather(
    tokens: np.ndarray, seq_len: int, rows: np.ndarray, device: torch.device | str
) -> Batch:
    # Views over the mapped file: only the rows asked for are read.
    end = num_rows(len(tokens), seq_len) * seq_len
    all_inputs = tokens[:end].reshape(-1, seq_len)  # (num_rows, T)
    all_targets = tokens[1 : end + 1].reshape(-1, seq_len)  # (num_rows, T), one token later
    shape = (len(rows), seq_len)
    inputs = torch.empty(shape, dtype=torch.int64, device=device)
    targets = torch.empty(shape, dtype=torch.int64, device=device)
    for tensor, source in ((inputs, all_inputs), (targets, all_targets)):
        if tensor.device.type == "cpu":
            tensor.numpy()[...] = source[rows]
            continue
        # Pinned memory lets the copy run beside computation. It comes from PyTorch's host cache,
        # which gives a block out again only after the copies from it are done.
        staging = torch.empty(shape, dtype=torch.int64, pin_memory=tensor.is_cuda)
        staging.numpy()[...] = source[rows]
        tensor.copy_(staging, non_blocking=tensor.is_cuda)
    return Batch(inputs, targets)

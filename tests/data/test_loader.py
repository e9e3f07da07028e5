"""Which tokens a step sees: all of them, once per epoch, however the step is divided."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from snugpt.data.loader import Batch, TrainingLoader, ValidationLoader, num_rows

SEQ_LEN = 4
NUM_ROWS = 50
# Each token is its own position, so a batch says where it came from.
TOKENS = np.arange(NUM_ROWS * SEQ_LEN + 3, dtype=np.uint16)


def _loader(**changes: Any) -> TrainingLoader:
    fields = {"tokens": TOKENS, "seq_len": SEQ_LEN, "seed": 5, "device_batch_size": 8}
    return TrainingLoader(**(fields | changes))


def _rows(batch: Batch) -> list[int]:
    return (batch.inputs[:, 0] // SEQ_LEN).tolist()


def test_targets_are_the_next_tokens() -> None:
    inputs, targets = _loader().batch(step=3)
    assert inputs.shape == targets.shape == (8, SEQ_LEN)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)]
)
def test_row_needs_one_token_more_than_its_length(num_tokens: int, expected: int) -> None:
    assert num_rows(num_tokens, SEQ_LEN) == expected


def test_epoch_has_every_target_once() -> None:
    loader = _loader(device_batch_size=NUM_ROWS)
    targets = loader.batch(step=0).targets
    assert sorted(targets.flatten().tolist()) == list(range(1, NUM_ROWS * SEQ_LEN + 1))
    assert loader.epochs(step=3) == 3.0


@given(
    st.sampled_from([(1, 1, 24), (2, 3, 4), (24, 1, 1), (3, 8, 1), (1, 2, 12), (4, 3, 2)]),
    st.integers(0, 40),
)
def test_step_sees_the_same_rows_however_it_is_divided(
    division: tuple[int, int, int], step: int
) -> None:
    grad_accum_steps, world_size, device_batch_size = division
    whole = _rows(_loader(device_batch_size=24).batch(step))
    parts = [
        row
        for micro_step in range(grad_accum_steps)
        for rank in range(world_size)
        for row in _rows(
            _loader(
                device_batch_size=device_batch_size,
                grad_accum_steps=grad_accum_steps,
                rank=rank,
                world_size=world_size,
            ).batch(step, micro_step)
        )
    ]
    assert parts == whole


def test_resumed_run_sees_what_the_uninterrupted_one_sees() -> None:
    unbroken = [_loader().batch(step).inputs for step in range(20)]
    loader = _loader()
    loader.batch(11)
    assert all(torch.equal(loader.batch(step).inputs, unbroken[step]) for step in range(12, 20))


def test_batch_allocates_inputs_then_targets_and_nothing_else() -> None:
    made: list[int] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            # Tensor.numpy() makes an alias of the same storage.
            if result.untyped_storage().data_ptr() not in made:
                made.append(result.untyped_storage().data_ptr())
            return result

    with Recorder():
        batch = _loader().batch(0)
    assert made == [tensor.data_ptr() for tensor in batch]
    assert [tensor.untyped_storage().nbytes() for tensor in batch] == [8 * SEQ_LEN * 8] * 2


def test_single_row_corpus_repeats_it() -> None:
    inputs = _loader(tokens=TOKENS[: SEQ_LEN + 1]).batch(9).inputs
    assert inputs.tolist() == [[0, 1, 2, 3]] * 8


def test_wide_ids_are_read() -> None:
    inputs = _loader(tokens=TOKENS.astype(np.uint32) + 70_000).batch(0).inputs
    assert int(inputs.min()) >= 70_000


@given(st.integers(1, 60), st.integers(1, 4), st.none() | st.integers(1, 60))
def test_validation_has_each_row_once_whatever_the_batch_size(
    device_batch_size: int, world_size: int, max_rows: int | None
) -> None:
    rows: list[int] = []
    for rank in range(world_size):
        loader = ValidationLoader(
            tokens=TOKENS,
            seq_len=SEQ_LEN,
            device_batch_size=device_batch_size,
            max_rows=max_rows,
            rank=rank,
            world_size=world_size,
        )
        rows += [row for number in range(loader.num_batches) for row in _rows(loader.batch(number))]
    assert sorted(rows) == list(range(min(NUM_ROWS, max_rows or NUM_ROWS)))


def test_validation_rows_are_in_the_order_of_the_text() -> None:
    loader = ValidationLoader(tokens=TOKENS, seq_len=SEQ_LEN, device_batch_size=8)
    assert _rows(loader.batch(1)) == list(range(8, 16))
    assert _rows(loader.batch(6)) == [48, 49]

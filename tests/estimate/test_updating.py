"""What an update takes beside its parameter: bounded, counted, and the same for any depth."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snugpt.estimate import updating
from snugpt.estimate.memory import timeline_of
from snugpt.estimate.operations import Net, Weight
from snugpt.estimate.simulation import simulate
from snugpt.estimate.timeline import Event
from snugpt.estimate.updating import (
    STRETCH_ELEMENTS,
    Updating,
    row_stretches,
    stored_as,
    update,
    update_cost,
)
from snugpt.model import muon
from snugpt.model.adamw import AdamW
from snugpt.model.muon import Muon
from snugpt.model.stored_state import Bf16, Fp32, Int8
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import shape_for
from snugpt.units import MIB

D24 = shape_for("nanochat", 24, context_len=2048)
CARD = Runtime(device="cuda", attention="flash", capability=(9, 0))
STATES, WEIGHTS = ("fp32", "bf16", "int8"), ("master", "bf16")
WAYS = tuple(product(("muon", "adamw"), STATES, WEIGHTS))
FORMATS = {"fp32": Fp32(), "bf16": Bf16(), "int8": Int8()}
NO_KERNEL = ("view", "slice", "t", "empty", "detach")


def peak(events: list[Event]) -> int:
    alive = highest = 0
    for sign, buffer in events:
        alive += sign * buffer.fixed_bytes
        highest = max(highest, alive)
    assert alive == 0
    return highest


def net(weights: str) -> Net:
    return Net(D24, CARD, "bf16", 2048, weight_dtype=weights)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_no_table_takes_more_than_one_stretch(way):
    optimizer, state, weights = way
    table = Weight("value_embedding", D24.padded_vocab_size, D24.kv_dim)  # 192 MiB in fp32
    taken = peak(update(net(weights), table, Updating(optimizer, state)))
    in_place = (state, weights) == ("fp32", "master")
    assert taken <= (0 if in_place else 17 * STRETCH_ELEMENTS + 8)
    assert in_place == (taken == 0)
    assert taken <= 34 * MIB + 8


@pytest.mark.parametrize(("state", "weights"), list(product(STATES, WEIGHTS)))
def test_muon_takes_its_matrix_twice_and_a_square(state, weights):
    C, M = D24.model_dim, D24.mlp_dim
    taken = {}
    for rows, columns in ((C, C), (M, C), (C, M)):
        matrix = Weight("up", rows, columns)
        taken[rows, columns] = peak(update(net(weights), matrix, Updating("muon", state)))
        by_stretches = 17 * min(rows * columns, STRETCH_ELEMENTS)
        iteration = 2 * 2 * rows * columns + 2 * C * C
        applied = 2 * rows * columns + 9 * STRETCH_ELEMENTS
        assert taken[rows, columns] <= max(iteration, by_stretches, applied)
        assert taken[rows, columns] >= iteration
    assert taken[M, C] == taken[C, M] == max(taken.values())


def test_int8_takes_whole_blocks_of_what_is_large_enough():
    assert [stored_as("int8", n) for n in (4095, 4096, 4097, 5000, 5120)] == [
        "fp32", "int8", "fp32", "fp32", "int8",
    ]  # fmt: skip
    assert {stored_as("bf16", n) for n in (1, 4097)} == {"bf16"}


class Traffic(TorchDispatchMode):
    """Bytes of all large tensors that operations read and write, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2].strip("_")
        if name not in NO_KERNEL:
            self.kernels += 1
            tensors = [
                t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)
            ]
            self.bytes += sum(t.nbytes for t in tensors if t.numel() >= 1000)
        return result


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_bytes_and_kernels_of_an_update_are_those_counted_call_by_call(way, monkeypatch):
    optimizer, state, weights = way
    shape = shape_for("nanochat", 1, width=512, heads=4, vocab_size=512, context_len=64)
    matrix = torch.nn.Parameter(
        torch.ones(512, 512).to(torch.bfloat16 if weights == "bf16" else None)
    )
    kind = Muon if optimizer == "muon" else AdamW
    made = kind([matrix], lr=0.1, formats={matrix: FORMATS[state]})
    monkeypatch.setattr(muon, "orthogonalised", lambda grad, dtype: grad)
    for _ in range(2):
        matrix.grad = torch.ones_like(matrix)
        with Traffic() as traffic:
            made.update(matrix, made.param_groups[0])
    only = {"query": Weight("query", 512, 512)}
    cost = updating._cost_of(only, Updating(optimizer, state, weights), 1)
    iteration = updating.NEWTON_SCHULZ_KERNELS if optimizer == "muon" else 0
    if way == ("adamw", "fp32", "master"):
        assert cost == (28 * 512 * 512, 2)  # one kernel, which no operation shows from inside
    else:
        assert cost.bytes == pytest.approx(traffic.bytes, rel=0.05)
        assert cost.kernels - iteration == pytest.approx(traffic.kernels, abs=6)
    assert update_cost(shape, Updating(optimizer, state, weights)).bytes > cost.bytes


def test_state_of_a_step_that_updates_in_backward_lies_there_from_the_start():
    schedule = Schedule(
        learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.0, warmup_fraction=0.0,
        cooldown_fraction=0.0, final_fraction=0.0, clip_norm=0.0, seed=0, eval_every_steps=1,
        eval_tokens=1, save_every_steps=1,
    )  # fmt: skip
    recipe = TrainingRecipe(
        seq_len=256, device_batch_size=1, grad_accum_steps=1, total_batch_tokens=256,
        total_tokens=2560, compute_dtype="bf16", loss="chunked", loss_chunk_tokens=256,
        checkpoint="none", optimizer="muon", schedule=schedule,
    )  # fmt: skip
    assert recipe.steps_in_backward
    shape = shape_for("nanochat", 4, context_len=256, vocab_size=8192)
    timeline = timeline_of(shape, recipe, CARD)
    assert "optimizer" not in {placed.phase for placed in timeline.placed}
    assert simulate(timeline, 1).allocated_bytes >= timeline.read(1)[0].bytes


def test_a_rank_that_owns_no_row_of_a_matrix_updates_nothing():
    assert list(row_stretches(0, 12, whole=True)) == []
    assert list(row_stretches(0, 12)) == []

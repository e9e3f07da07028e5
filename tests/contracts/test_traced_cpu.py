"""The trace against torch's real CPU allocator: the same blocks taken and given back, in order."""

from __future__ import annotations

import time
from itertools import product

import pytest
import torch
from fuzzed_steps import sets_of_steps
from recorder import cpu_runtime, recipe_for

from snugpt.model.build import build_for_training
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import Batch, evaluate_batch, step
from snugpt.run.cpu_allocations import CpuAllocations
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import STYLES, ModelShape, shape_for
from snugpt.tracing.steps import trace_training

SCALAR_BYTES = 512  # numbers wrapped as tensors and the like
LEVERS = tuple(product(("muon", "adamw"), ("none", "blocks"), (1, 2), ("chunked", "plain")))

pytestmark = pytest.mark.usefixtures("one_thread")


def small(style: str, **pinned) -> ModelShape:
    sizes = {"context_len": 160, "width": 64, "heads": 4, "kv_heads": 2, "vocab_size": 700}
    return shape_for(style, 2, **(sizes | pinned))


def real_events(shape: ModelShape, recipe: TrainingRecipe) -> list[int]:
    """Bytes taken (above 0) and given back (below) by a second step and an evaluation batch."""

    def batch_of(_: int) -> Batch:
        size = recipe.device_batch_size, recipe.seq_len
        tokens, targets = (torch.empty(size, dtype=torch.int64) for _ in range(2))
        return tokens.random_(0, shape.vocab_size), targets.random_(0, shape.vocab_size)

    with CpuAllocations() as allocations:
        model = build_for_training(shape, recipe, cpu_runtime(shape), seed=0)
        optimizers = optimizers_for(model, recipe)
        step(model, optimizers, recipe, batch_of)
        start_ns = time.time_ns()
        step(model, optimizers, recipe, batch_of)
        evaluate_batch(model.eval(), recipe, batch_of(0))
        end_ns = time.time_ns()
    assert not allocations.interrupted
    times = (start_ns, end_ns)
    events = [e for e in allocations.events if times[0] <= e.time_ns <= times[1]]
    return [e.bytes for e in events if abs(e.bytes) > SCALAR_BYTES]


def traced_events(shape: ModelShape, recipe: TrainingRecipe) -> list[int]:
    timeline = trace_training(shape, recipe, cpu_runtime(shape))
    sizes = [sign * buffer.fixed_bytes for _, _, (sign, buffer) in timeline.events()]
    return [size for size in sizes if abs(size) > SCALAR_BYTES]


def assert_same_events(shape: ModelShape, **asked) -> None:
    recipe = recipe_for(shape, batch=3, **asked)
    traced = traced_events(shape, recipe)
    assert len(traced) > 100
    assert traced == real_events(shape, recipe)


@pytest.mark.parametrize("levers", LEVERS, ids=lambda levers: "-".join(map(str, levers)))
@pytest.mark.parametrize("style", STYLES)
def test_a_trace_is_what_the_allocator_sees(style, levers):
    optimizer, checkpoint, accumulation, loss = levers
    assert_same_events(
        small(style), optimizer=optimizer, checkpoint=checkpoint, accumulation=accumulation,
        loss=loss,
    )  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_what_is_made_again_is_traced(style):
    for steps in sets_of_steps(style):
        assert_same_events(small(style), checkpoint="selective", steps=steps)


@pytest.mark.parametrize("steps", [("pointwise",), ("up",), ("pointwise", "up")])
def test_dropout_is_drawn_once_whatever_is_made_again(steps):
    shape = small("gpt2", dropout=0.1)
    assert_same_events(shape, checkpoint="selective", steps=steps, accumulation=2)


@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
def test_dropout_is_traced_with_its_random_states(checkpoint):
    assert_same_events(small("gpt2", dropout=0.1), checkpoint=checkpoint, accumulation=2)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("style", STYLES)
def test_heads_and_ties_are_traced(style, kv_heads, tie):
    assert_same_events(small(style, kv_heads=kv_heads, tie=tie))


@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_updates_in_backward_are_traced(style, tie, checkpoint):
    optimizer = "adamw" if tie else "muon"
    shape = small(style, tie=tie)
    assert_same_events(shape, optimizer=optimizer, checkpoint=checkpoint, clip_norm=0.0)


@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
@pytest.mark.parametrize("style", STYLES)
def test_products_in_fp8_are_traced(style, checkpoint):
    assert_same_events(small(style), fp8="on", checkpoint=checkpoint, accumulation=2)


def test_windows_are_traced():
    assert_same_events(small("nanochat", context_len=512, window_pattern="SL"))

"""The lever `offload = activations`: the same step to the bit, and no copy used too early."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from late_copies import LateCopies
from msgspec.structs import replace
from small_model import random_batch, small_model, small_recipe, small_shape

from snugpt.estimate.training import TrainingStep
from snugpt.model import copies
from snugpt.model.copies import CudaCopies
from snugpt.model.host_memory import HostPool
from snugpt.model.offload import offload_activations
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import step
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, ModelShape


def steps(shape: ModelShape, *, offload: bool, blocks: bool = False, again=(), **asked):
    """The weights after three steps, and the copies that were made on the way."""
    late = LateCopies()
    model = small_model(shape)
    model.recompute_blocks = blocks
    for block in model.blocks:
        block.made_again = again
    if offload:
        offload_activations(model).copies_for = lambda _: late
    recipe = small_recipe(2, 32, **asked)
    optimizers = optimizers_for(model, recipe)
    torch.manual_seed(0)
    for number in range(3):
        batches = [random_batch(shape, 2, 32, seed=10 * number + i) for i in range(2)]
        step(model, optimizers, recipe, batches.__getitem__)
    return [weight.detach().clone() for weight in model.parameters()], late


def bytes_of_a_pass(shape: ModelShape, again=()) -> int:
    """What is predicted to move of a micro-batch of two rows."""
    recipe = replace(
        small_recipe(2, 32), offload="activations", selective_steps=again,
        checkpoint="selective" if again else "none",
    )  # fmt: skip
    timeline = TrainingStep(shape, recipe, Runtime(device="cpu", attention="cpu")).timeline()
    return sum(b.fixed_bytes + 2 * b.sequence_bytes for b in timeline.host)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_a_step_whose_activations_wait_on_the_host_is_the_same_to_the_bit(style, blocks, optimizer):
    shape = small_shape(style, depth=4, tie=style == "llama")
    asked = {"blocks": blocks, "optimizer": optimizer, "accumulation": 2}
    plain, none = steps(shape, offload=False, **asked)
    moved, late = steps(shape, offload=True, **asked)
    assert none.host_bytes == 0 < late.host_bytes
    assert all(torch.equal(one, other) for one, other in zip(plain, moved, strict=True))


@pytest.mark.parametrize("again", [("qkv",), ("up",), ("qkv", "up")])
@pytest.mark.parametrize("style", STYLES)
def test_what_is_not_made_again_moves_and_the_step_is_the_same_to_the_bit(style, again):
    shape = small_shape(style, depth=4)
    plain, _ = steps(shape, offload=False)
    moved, late = steps(shape, offload=True, again=again)
    assert late.host_bytes == 3 * bytes_of_a_pass(shape, again)
    assert 0 < bytes_of_a_pass(shape, again) < bytes_of_a_pass(shape)
    assert all(torch.equal(one, other) for one, other in zip(plain, moved, strict=True))


def test_dropout_is_the_same_to_the_bit_and_its_masks_move():
    shape = small_shape("gpt2", dropout=0.1)
    plain, _ = steps(shape, offload=False)
    moved, _ = steps(shape, offload=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, moved, strict=True))


@pytest.mark.parametrize("style", STYLES)
def test_every_tensor_of_all_layers_but_the_last_moves_once_a_pass(style):
    shape = small_shape(style, depth=3)
    _, late = steps(shape, offload=True)
    assert late.host_bytes == 3 * bytes_of_a_pass(shape) > 0


def test_places_on_the_host_are_taken_once_and_anew_for_another_batch():
    shape = small_shape("llama")
    model = small_model(shape)
    pools: list[HostPool] = []
    offload = offload_activations(model)

    def loss(batch: int) -> None:
        tokens, targets = random_batch(shape, batch, 32)
        model.loss(model.hidden(tokens), targets, chunk=50, scale=1.0).backward()
        pools.append(offload._pool)

    for batch in (2, 2, 1):
        loss(batch)
    assert pools[0] is pools[1] is not pools[2]


def test_without_gradients_nothing_moves():
    shape = small_shape("nanochat")
    model = small_model(shape)
    offload = offload_activations(model)
    with torch.no_grad():
        model.hidden(random_batch(shape, 2, 32)[0])
    assert offload._input is None


def test_a_pass_that_was_given_up_leaves_nothing_to_the_next():
    shape = small_shape("llama")
    model = small_model(shape)
    offload_activations(model)
    tokens, _ = random_batch(shape, 2, 32)
    expected = small_model(shape).hidden(tokens)
    model.hidden(tokens)  # no backward
    found = model.hidden(tokens)
    found.sum().backward()
    assert torch.equal(found, expected)


def test_a_pass_that_failed_holds_no_memory_of_the_device():
    shape = small_shape("llama")
    model = small_model(shape)
    offload = offload_activations(model)
    layers: list[weakref.ref] = []
    tokens, _ = random_batch(shape, 2, 32)

    def failing(block, x):
        found = offload.layer(block, x)
        layers.append(weakref.ref(found))
        if block.layer == 1:
            monkey.setattr(block, "mlp", None)
        return found

    model.around_layer = failing
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as monkey, pytest.raises(TypeError) as error:
            model.hidden(tokens)
        del error
        assert len(layers) == 2
        assert [layer() for layer in layers] == [None, None]
    finally:
        gc.enable()


class Stream:
    """A stand-in for a CUDA stream that writes down what it is told."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} marks")
        return f"the mark of {self.name}"


def test_on_cuda_copies_follow_what_was_computed_and_go_beside_it(monkeypatch):
    log: list[str] = []
    names = iter(("out", "in"))

    @contextmanager
    def running(stream: Stream):
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    monkeypatch.setattr(copies.torch.cuda, "Stream", lambda _: Stream(next(names), log))
    monkeypatch.setattr(copies.torch.cuda, "current_stream", lambda _: Stream("main", log))
    monkeypatch.setattr(copies.torch.cuda, "stream", running)
    cuda = CudaCopies(torch.device("cuda"))
    one, other = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    cuda.to_host(one, other)
    sent = cuda.sent()
    cuda.wait(sent)
    assert log == [
        "out waits for main", "on out", "off out", "out marks", "main waits for the mark of out",
    ]  # fmt: skip
    assert torch.equal(one, other)
    log.clear()
    cuda.wait(cuda.to_device([(one, other)]))
    assert log == [
        "in waits for main", "on in", "off in", "in marks", "main waits for the mark of in",
    ]  # fmt: skip
    log.clear()
    cuda.wait(None)
    assert log == []

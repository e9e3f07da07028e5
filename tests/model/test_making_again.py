"""`checkpoint = selective` on the real model: the same gradients, from less that is kept."""

from __future__ import annotations

import gc
from itertools import combinations

import pytest
import torch
from small_model import random_batch, small_model, small_recipe, small_shape
from torch.utils._python_dispatch import TorchDispatchMode

from snugpt.model.gpt import GPT
from snugpt.model.making_again import Keeping, Place, keeping
from snugpt.model.step import Batch, micro_batch, no_mark
from snugpt.spec.recipe import SELECTIVE_STEPS
from snugpt.spec.shape import STYLES

SETS = [steps for n in range(1, 4) for steps in combinations(SELECTIVE_STEPS, n)]
TOKENS = 150  # past the window of nanochat style


def gradients(model: GPT, batch: Batch, steps: tuple[str, ...]) -> dict[str, torch.Tensor]:
    for block in model.blocks:
        block.made_again = steps
    model.zero_grad()
    torch.manual_seed(7)
    micro_batch(model, small_recipe(2, TOKENS), batch, 0.01, no_mark)
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("style", STYLES)
def test_every_set_of_steps_gives_the_same_gradients_to_the_bit(style, dtype, dropout):
    shape = small_shape(style, dropout=dropout)
    model, batch = small_model(shape, dtype=dtype).train(), random_batch(shape, 2, TOKENS)
    plain = gradients(model, batch, ())
    for steps in SETS:
        again = gradients(model, batch, steps)
        differ = [name for name, right in plain.items() if not torch.equal(again[name], right)]
        assert differ == [], steps


def test_a_product_is_made_again_only_if_a_step_says_so():
    products = {
        (): 0,
        ("pointwise",): 0,
        ("qkv",): 3,
        ("up",): 2,  # llama's gate too
        ("pointwise", "qkv", "up"): 5,
    }
    shape = small_shape("llama", depth=1)
    model, batch = small_model(shape), random_batch(shape, 1, 20)
    counted = {steps: products_of(model, batch, steps) for steps in products}
    plain = counted[()]
    assert {steps: n - plain for steps, n in counted.items()} == products


def products_of(model: GPT, batch: Batch, steps: tuple[str, ...]) -> int:
    """Matrix products of one step, forward and backward."""
    with Counting() as counting:
        gradients(model, batch, steps)
    return counting.products


class Counting(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_a_call_runs_once_for_all_that_read_its_results():
    ran = []

    def doubled(x):
        ran.append(x)
        return 2 * x

    x = torch.ones(3, requires_grad=True)
    with keeping(("up",)) as keep:
        y = keep.unless({"up"}, doubled, x)
        z = (y * y).sum() + y.exp().sum()
    del y
    z.backward()
    assert len(ran) == 2
    torch.testing.assert_close(x.grad, 8 * torch.ones(3) + 2 * torch.full((3,), 2.0).exp())


def test_a_call_makes_what_its_own_inputs_lack():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    order = []

    def squared(x):
        order.append("squared")
        return x * x

    def cubed(y):
        order.append("cubed")
        return y * y * y

    with keeping(("pointwise", "qkv")) as keep:
        y = keep.unless({"pointwise"}, squared, x)
        z = keep.unless({"qkv"}, cubed, y)
        out = (z * z).sum()
    del y, z
    order.clear()
    out.backward()
    assert order == ["squared", "cubed"]
    torch.testing.assert_close(x.grad, 12 * torch.tensor([1.0, 2.0]) ** 11)


def test_a_storage_that_took_a_freed_ones_address_is_not_mistaken_for_it():
    kept = []
    with keeping(("up",)) as keep:
        for value in range(50):
            x = torch.full((4,), float(value), requires_grad=True)
            y = keep.unless({"up"}, torch.neg, x)
            del y  # its storage's address is free for the next one
            other = x.detach() + 1
            kept.append((x, other.sum(), (x * other).sum()))
            del other
    for x, _, out in kept:
        out.backward()
        torch.testing.assert_close(x.grad, x.detach() + 1)


@pytest.mark.parametrize("style", STYLES)
def test_a_graph_that_is_dropped_leaves_no_circle_behind(style):
    shape = small_shape(style)
    model, (tokens, _) = small_model(shape), random_batch(shape, 2, 20)
    for block in model.blocks:
        block.made_again = ("pointwise", "qkv", "up")
    gc.disable()
    try:
        h = model.hidden(tokens)
        assert places_alive()
        del h
        assert not places_alive()
    finally:
        gc.enable()


def places_alive() -> bool:
    return any(type(each) is Place for each in gc.get_objects())


def test_without_gradients_nothing_is_watched():
    with torch.no_grad():
        assert not isinstance(keeping(("up",)), Keeping)
    assert not isinstance(keeping(()), Keeping)
    assert isinstance(keeping(("up",)), Keeping)

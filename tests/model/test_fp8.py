"""FP8 products against numbers rounded by hand, and a model that learns with them."""

from __future__ import annotations

import msgspec
import pytest
import torch
from loss_curves import mean_loss
from small_model import random_batch, small_recipe, small_shape
from torch import Tensor

from snugpt.model.build import build_for_training
from snugpt.model.fp8 import E4M3, E5M2, Fp8Linear, cast, scale_of
from snugpt.model.functions import Linear
from snugpt.model.step import evaluate_batch
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES

LARGEST_CHANGE = 0.004  # of the mean loss of three seeds; 0.0004 was seen
N, I, O = 64, 48, 32  # noqa: E741
FORMATS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}  # mantissa bits, exponent, largest


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as an FP8 format holds it, scaled by a power of two, in fp64: no FP8 cast is used."""
    bits, lowest_exponent, largest = FORMATS[dtype]
    x = x.double()
    scale = 2.0 ** torch.floor(torch.log2(largest / x.abs().max()))
    scaled = x * scale
    exponent = torch.floor(torch.log2(scaled.abs())).clamp(min=lowest_exponent)
    unit = 2.0 ** (exponent - bits)
    return (scaled / unit).round() * unit / scale


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """An input, a weight and a gradient of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(size, generator=generator) * scale
        for size, scale in (((4, N // 4, I), 3.0), ((O, I), 0.02), ((4, N // 4, O), 1e-7))
    )
    return x.to(dtype).requires_grad_(), weight.requires_grad_(), grad.to(dtype)


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # whose way is taken: the tensors are the CPU's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_numbers_rounded_to_fp8(dtype, device):
    x, weight, grad = drawn(dtype)
    out = Fp8Linear.apply(x, weight, device)
    out.backward(grad)
    rows, low_weight = rounded(x.detach().view(N, I), E4M3), rounded(weight.detach(), E4M3)
    low_grad = rounded(grad.view(N, O), E5M2)
    error = 1e-2 if dtype == torch.bfloat16 else 1e-5  # of the result, cast to the dtype
    for found, expected in (
        (out.view(N, O), rows @ low_weight.t()),
        (x.grad.view(N, I), low_grad @ low_weight),
        (weight.grad, low_grad.t() @ rows),
    ):
        size = expected.abs().max()
        torch.testing.assert_close(found.double() / size, expected / size, rtol=0, atol=error)
    assert (out.dtype, x.grad.dtype, weight.grad.dtype) == (dtype, dtype, torch.float32)


def test_both_ways_give_the_same_numbers():
    results = []
    for device in ("cpu", "cuda"):
        x, weight, grad = drawn(torch.float32)
        out = Fp8Linear.apply(x, weight, device)
        out.backward(grad)
        results.append((out.detach(), x.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("largest", [1e-30, 3e-5, 0.875, 0.8751, 1.0, 448.0, 449.0, 7e4])
def test_a_scale_is_the_largest_power_of_two_that_stays_within_the_format(largest, dtype):
    x = torch.tensor([[largest, -largest / 3]])
    scale = scale_of(x, dtype).item()
    most = torch.finfo(dtype).max
    assert scale == 2.0 ** round(torch.log2(torch.tensor(scale)).item())
    assert scale * largest <= most
    assert 2 * scale * max(largest, 1e-12) > most
    assert cast(x, scale_of(x, dtype), dtype, "cpu").float().isfinite().all()


def test_zeros_stay_zeros():
    x, weight, grad = drawn(torch.bfloat16)
    x = torch.zeros_like(x, requires_grad=True)
    out = Fp8Linear.apply(x, weight, "cpu")
    out.backward(torch.zeros_like(grad))
    assert out.count_nonzero() == x.grad.count_nonzero() == weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_is_not_hidden(bad):
    x, weight, grad = drawn(torch.bfloat16)
    grad[0, 0, 0] = bad
    out = Fp8Linear.apply(x, weight, "cpu")
    out.backward(grad)
    assert not weight.grad.isfinite().all()


def test_the_meta_kernel_takes_the_layouts_that_cuda_wants():
    x, weight, grad = (each.detach().to("meta") for each in drawn(torch.bfloat16))
    out = Fp8Linear.apply(x.requires_grad_(), weight.requires_grad_(), "cuda")
    out.backward(grad)
    assert weight.grad.shape == (O, I)


@pytest.mark.parametrize("style", STYLES)
def test_evaluation_does_not_multiply_in_fp8(style):
    shape = small_shape(style)
    recipe = small_recipe(2, 16)
    low = msgspec.structs.replace(recipe, fp8="on")
    runtime = Runtime(device="cpu", attention="cpu")
    batch = random_batch(shape, 2, 16)
    plain, fp8 = (
        evaluate_batch(build_for_training(shape, each, runtime, seed=1).eval(), each, batch)
        for each in (recipe, low)
    )
    assert torch.equal(plain, fp8)


@pytest.mark.parametrize("style", STYLES)
def test_every_matrix_and_nothing_else_is_multiplied_in_fp8(style, monkeypatch):
    shape = small_shape(style, depth=2)
    recipe = small_recipe(2, 16)
    seen: list[Tensor] = []
    plain: list[Tensor] = []
    taken = Fp8Linear.apply
    monkeypatch.setattr(Fp8Linear, "apply", lambda x, w, d: seen.append(w) or taken(x, w, d))
    monkeypatch.setattr(Linear, "apply", lambda x, w: plain.append(w))
    runtime = Runtime(device="cpu", attention="cpu")
    model = build_for_training(shape, recipe, runtime, seed=1)
    for block in model.blocks:
        block.fp8 = True
    model.hidden(random_batch(shape, 2, 16)[0])
    names = {id(weight): name for name, weight in model.named_parameters()}
    leaves = [names[id(weight)].rsplit(".", 1)[-1] for weight in seen]
    gates = ["gate"] if style == "llama" else []
    assert sorted(leaves) == sorted(
        ["query", "key", "value", "output", "up", "down", *gates] * shape.num_layers
    )
    assert plain == []


def test_a_model_learns_as_well_as_in_fp32():
    assert mean_loss(fp8="on") == pytest.approx(mean_loss(), rel=LARGEST_CHANGE)

"""Each autograd function against the textbook expression, differentiated by PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snugpt.model import functions as op

B, T, C, K, D, G, V, O = 2, 5, 16, 2, 8, 12, 11, 7  # noqa: E741
TOKENS = torch.tensor([[1, 3, 3, 10, 0], [3, 2, 1, 1, 9]])
DROPPED_SEED = 3


class Case(NamedTuple):
    ours: Callable[..., Tensor]
    textbook: Callable[..., Tensor]
    sizes: tuple[tuple[int, ...], ...]
    fp64: bool = True  # statistics of the norms and gradients of embeddings are always fp32


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def turned(x: Tensor) -> Tensor:
    """The two halves of a head as real and imaginary parts, turned by minus the angle."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(ANGLE), -ANGLE)
    return torch.cat([z.real, z.imag], -1)


ANGLE = torch.arange(T * D / 2, dtype=torch.float64).view(T, 1, D // 2) / 7


def gated(h: Tensor, weight: Tensor, v: Tensor, ve: Tensor) -> Tensor:
    return v + 2 * torch.sigmoid(F.linear(h[..., :G], weight))[..., None] * ve


def dropped_out(x: Tensor) -> Tensor:
    torch.manual_seed(DROPPED_SEED)
    keep = ~torch.empty(x.shape, dtype=torch.bool).bernoulli_(0.3)
    return x * keep / 0.7


def ours_dropped_out(x: Tensor) -> Tensor:
    torch.manual_seed(DROPPED_SEED)
    return op.Dropout.apply(x, 0.3)


def positioned(x: Tensor, table: Tensor) -> Tensor:
    return x + table[2 : 2 + T]


CASES = {
    "embedding": Case(
        lambda table: op.Embedding.apply(table, TOKENS, table.dtype),
        lambda table: table[TOKENS],
        ((V, C),),
        fp64=False,
    ),
    "positions": Case(
        lambda x, table: op.Positions.apply(x, table, 2), positioned, ((B, T, C), (9, C)), False
    ),
    "linear": Case(op.Linear.apply, F.linear, ((B, T, C), (O, C))),
    "rms_norm": Case(op.RMSNorm.apply, rms, ((B, T, C),), fp64=False),
    "rms_norm_of_heads": Case(op.RMSNorm.apply, rms, ((B, T, K, D),), fp64=False),
    "weighted_rms_norm": Case(
        op.WeightedRMSNorm.apply, lambda x, w: rms(x) * w, ((B, T, C), (C,)), fp64=False
    ),
    "layer_norm": Case(
        op.LayerNorm.apply, lambda x, w: F.layer_norm(x, (C,), w), ((B, T, C), (C,))
    ),
    "rotary": Case(
        lambda x: op.Rotary.apply(x, ANGLE.cos().to(x.dtype), ANGLE.sin().to(x.dtype)),
        turned,
        ((B, T, K, D),),
    ),
    "relu_squared": Case(op.ReluSquared.apply, lambda x: F.relu(x) ** 2, ((B, T, C),)),
    "gelu": Case(op.Gelu.apply, F.gelu, ((B, T, C),)),
    "swiglu": Case(op.SwiGLU.apply, lambda gate, up: F.silu(gate) * up, ((B, T, C), (B, T, C))),
    "value_gate": Case(op.ValueGate.apply, gated, ((B, T, C), (K, G), (B, T, K, D), (B, T, K, D))),
    "dropout": Case(ours_dropped_out, dropped_out, ((B, T, C),)),
    "residual_add": Case(op.ResidualAdd.apply, torch.add, ((B, T, C), (B, T, C))),
}


def inputs_of(case: Case, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in case.sizes]


def value_and_gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_the_textbooks(name):
    case = CASES[name]
    ours = value_and_gradients(case.ours, inputs_of(case, torch.float32))
    in_fp64 = [x.detach().double().requires_grad_() for x in inputs_of(case, torch.float32)]
    for got, wanted in zip(ours, value_and_gradients(case.textbook, in_fp64), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].fp64])
def test_gradients_are_the_slopes_of_the_value(name):
    case = CASES[name]
    assert torch.autograd.gradcheck(case.ours, inputs_of(case, torch.float64))


@pytest.mark.parametrize("name", [name for name in CASES if name != "dropout"])
def test_backward_leaves_what_it_was_given_as_it_was(name):
    case = CASES[name]
    inputs = inputs_of(case, torch.float32)
    copies = [x.detach().clone() for x in inputs]
    out = case.ours(*inputs)
    upstream = torch.randn_like(out)
    before = out.detach().clone(), upstream.clone()
    out.backward(upstream)
    torch.testing.assert_close((out.detach(), upstream), before, rtol=0, atol=0)
    torch.testing.assert_close([x.detach() for x in inputs], copies, rtol=0, atol=0)


def test_a_weight_of_zero_in_a_norm_still_gets_its_gradient():
    x, weight = inputs_of(CASES["weighted_rms_norm"], torch.float32)
    weight.data.zero_()
    op.WeightedRMSNorm.apply(x, weight).backward(torch.ones(B, T, C))
    torch.testing.assert_close(weight.grad, rms(x.detach()).sum((0, 1)), rtol=1e-5, atol=1e-6)


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    out = op.Dropout.apply(torch.ones(200, 500), 0.25)
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)


def test_functions_in_bf16_stay_in_bf16_but_for_gradients_of_weights():
    x = torch.randn(B, T, C).bfloat16().requires_grad_()
    weight = torch.randn(O, C, requires_grad=True)
    out = op.Linear.apply(x, weight)
    out.sum().backward()
    assert (out.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert weight.grad.dtype == torch.float32

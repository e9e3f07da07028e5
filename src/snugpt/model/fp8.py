"""Linear maps whose products are taken in FP8: e4m3 for inputs and weights, e5m2 for gradients.

A tensor is scaled as a whole so that its largest number nearly fills the format, cast to one byte
per element, and multiplied; the product is scaled back. Scales are measured anew at each use, as
nanochat and torchao do it ("dynamic, tensorwise"). They are rounded down to a power of two: scaling
bf16 is then exact, so that the cast rounds once and needs no fp32 copy.

Weights, kept activations and gradients stay in their own dtypes. FP8 copies live only from their
cast to their product: kept ones would lie beside the bf16 tensors that norms, attention and squared
ReLU keep for themselves anyway.

CUDA multiplies FP8 only by rows times columns, each in one piece (cuBLASLt), so backward casts into
transposed copies. Elsewhere the FP8 numbers are multiplied in fp32: the same sums, slowly.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2  # 4 or 5 bits of exponent
LEAST_MAXIMUM = 1e-12  # a tensor of zeros is scaled as if this were in it
EXPONENT_BITS = -(1 << 23)  # sign and exponent of an fp32, without its mantissa


class Fp8Linear(Function):
    """x @ weight.T without bias: (..., I), (O, I) -> (..., O). Keeps x and two scales."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, device: str = "cpu") -> Tensor:
        rows = x.view(-1, x.shape[-1])  # (N, I)
        scale_x, scale_weight = scale_of(rows, E4M3), scale_of(weight, E4M3)
        ctx.save_for_backward(x, weight, scale_x, scale_weight)
        ctx.device = device
        low_x = cast(rows, scale_x, E4M3, device)
        low_weight = cast(weight, scale_weight, E4M3, device)
        scales = scale_x, scale_weight
        out = product(low_x, low_weight.t(), scales, x.dtype, device, fast=True)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale_x, scale_weight = ctx.saved_tensors
        device = ctx.device
        rows, grad_rows = x.view(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        scale_grad = scale_of(grad_rows, E5M2)
        low_grad = cast(grad_rows.t(), scale_grad, E5M2, device)  # (O, N)
        low_x = cast(rows.t(), scale_x, E4M3, device)  # (I, N)
        scales = scale_grad, scale_x
        grad_weight = product(low_grad, low_x.t(), scales, weight.dtype, device)  # (O, I)
        del low_grad, low_x
        low_grad = cast(grad_rows, scale_grad, E5M2, device)  # (N, O)
        low_weight = cast(weight.t(), scale_weight, E4M3, device)  # (I, O)
        scales = scale_grad, scale_weight
        grad_x = product(low_grad, low_weight.t(), scales, x.dtype, device)
        return grad_x.view(x.shape), grad_weight, None


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest power of two with which all of x stays within the format, () fp32.

    Infinities and NaN in x make the product NaN.
    """
    largest = torch.linalg.vector_norm(x, torch.inf).float()
    ratio = largest.clamp_(min=LEAST_MAXIMUM).reciprocal_().mul_(torch.finfo(dtype).max)
    ratio.view(torch.int32).bitwise_and_(EXPONENT_BITS)
    return ratio


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """x * scale in FP8 and in one piece, whichever way x lies: the same shape, one byte each."""
    low = torch.empty(x.shape, dtype=dtype, device=x.device)
    if device == "cuda":  # the kernel casts what it stores
        return torch.mul(x, scale, out=low)
    return low.copy_(x * scale)


def product(
    a: Tensor,
    b: Tensor,
    scales: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    device: str,
    *,
    fast: bool = False,
) -> Tensor:
    """(m, k) @ (k, n) of scaled FP8 matrices in `dtype`, b by columns: (m, n).

    Summed in fp32; on Hopper `fast` sums a little less exactly, good enough for forward.
    """
    back_a, back_b = (scale.reciprocal() for scale in scales)
    if device == "cuda":
        return torch._scaled_mm(a, b, back_a, back_b, out_dtype=dtype, use_fast_accum=fast)
    out = (a.float() @ b.float()).mul_(back_a).mul_(back_b)
    return out.to(dtype)

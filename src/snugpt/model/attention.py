"""Causal attention as one autograd function, with the kernel each device has.

    flash       CUDA 8.0 and up, bf16: windows and grouped heads inside the kernel
    efficient   other CUDA: windows by a (T, T) mask, grouped heads by repeating keys and values
    cpu         the tiled CPU kernel: windows by a (T, T) mask, grouped heads inside the kernel
    math        the CPU kernel has no dropout; this keeps the (B*H, T, T) weights

q is (B, T, H, D), k and v are (B, S, K, D); the result is (B, T, H, D) and contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from snugpt.spec.runtime import mask_columns

aten = torch.ops.aten


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str,
    window: int | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend causally; `mask` (T, T) is the window's additive mask where the kernel needs one."""
    if backend == "math" and dropout == 0.0:
        backend = "cpu"
    if backend == "math":
        return MathAttention.apply(q, k, v, dropout)
    return FusedAttention.apply(q, k, v, backend, window, mask, dropout)


def window_mask(
    length: int, window: int | None, dtype: torch.dtype, device: torch.device, start: int = 0
) -> Tensor:
    """(T, start + T): 0 where query i may see key j, that is i - window < j <= i, else -inf.

    The first query is at position `start`, behind what a cache holds.
    """
    keys = start + length
    mask = torch.full((length, mask_columns(keys)), -torch.inf, dtype=dtype, device=device)
    mask.triu_(start + 1)
    if window is not None:
        mask.add_(torch.full_like(mask, -torch.inf).tril_(start - window))
    return mask[:, :keys]


class FusedAttention(Function):
    """Keeps q, k, v, its output and one fp32 per query and head; never the (T, T) scores."""

    @staticmethod
    def forward(ctx, q, k, v, backend: str, window: int | None, mask: Tensor | None, dropout):
        kernel = {"flash": _flash, "efficient": _efficient, "cpu": _cpu}[backend]
        out, *kept = kernel(q, k, v, window, mask, dropout)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.options = backend, window, mask, dropout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        backend, window, mask, dropout = ctx.options
        kernel = {
            "flash": _flash_backward, "efficient": _efficient_backward, "cpu": _cpu_backward
        }[backend]  # fmt: skip
        grads = kernel(grad, *ctx.saved_tensors, window, mask, dropout)
        return *grads, None, None, None, None


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, T, H, D) -> (B, H, T, D) without a copy, and back."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _cpu(q, k, v, window, mask, dropout):
    q, k, v = _heads_first(q, k, v)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, _causal(q, mask), attn_mask=mask
    )
    return out.transpose(1, 2), lse


def _cpu_backward(grad, q, k, v, out, lse, window, mask, dropout):
    grad, q, k, v, out = _heads_first(grad, q, k, v, out)
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, _causal(q, mask), attn_mask=mask
    )
    return _heads_first(*grads)


def _flash(q, k, v, window, mask, dropout):
    out, lse, rng_state, unused, _ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], dropout, True, False,
        **_flash_window(window),
    )  # fmt: skip
    return out, lse, rng_state, unused


def _flash_backward(grad, q, k, v, out, lse, rng_state, unused, window, mask, dropout):
    return aten._flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], dropout, True,
        rng_state, unused, **_flash_window(window),
    )  # fmt: skip


def _flash_window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _efficient(q, k, v, window, mask, dropout):
    repeats = q.shape[2] // k.shape[2]
    if repeats > 1:  # the kernel wants as many key heads as query heads
        k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    q, k, v = _heads_first(q, k, v)
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        q, k, v, _expanded(mask, q), True, dropout, _causal(q, mask)
    )
    return out.transpose(1, 2), lse, seed, offset


def _efficient_backward(grad, q, k, v, out, lse, seed, offset, window, mask, dropout):
    B, S, K, D = k.shape
    repeats = q.shape[2] // K
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    grad, q, k, v, out = _heads_first(grad, q, k, v, out)
    grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, _expanded(mask, q), out, lse, seed, offset, dropout,
        [True, True, True, False], _causal(q, mask),
    )  # fmt: skip
    grad_q, grad_k, grad_v = _heads_first(grad_q, grad_k, grad_v)
    if repeats > 1:
        grad_k, grad_v = (g.reshape(B, S, K, repeats, D).sum(3) for g in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


def _causal(q: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel hides later keys; it counts both from 0, so a lone query sees them all."""
    return mask is None and q.shape[2] > 1


def _expanded(mask: Tensor | None, q: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(q.shape[0], q.shape[1], *mask.shape)


class MathAttention(Function):
    """Attention with dropout, written out. Keeps copies of q, k, v for every query head and
    (B*H, T, T) twice: the weights in the compute dtype and one byte each for what was dropped."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        _, T, H, D = q.shape
        ctx.kv_heads = k.shape[2]
        q, k, v = (by_head(x, H) for x in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2)).mul_(D**-0.5)  # (B*H, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu_(1)
        weights.masked_fill_(future, -torch.inf)
        weights.sub_(weights.amax(-1, keepdim=True)).exp_()
        weights.div_(weights.sum(-1, keepdim=True))
        dropped = torch.empty_like(weights, dtype=torch.bool).bernoulli_(dropout)
        ctx.save_for_backward(q, k, v, weights, dropped)
        ctx.heads, ctx.scale = H, 1 / (1 - dropout)
        kept = weights.masked_fill(dropped, 0).mul_(ctx.scale)
        return by_token(torch.bmm(kept, v), H)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, weights, dropped = ctx.saved_tensors
        grad = by_head(grad, ctx.heads)
        kept = weights.masked_fill(dropped, 0).mul_(ctx.scale)
        grad_v = by_token(torch.bmm(kept.transpose(1, 2), grad), ctx.heads, ctx.kv_heads)
        # softmax backward: ds = w * (dw - sum(dw * w)), the scale of q @ k folded in
        slope = torch.bmm(grad, v.transpose(1, 2), out=kept)
        slope.masked_fill_(dropped, 0).mul_(ctx.scale)
        product = slope * weights
        slope.sub_(product.sum(-1, keepdim=True)).mul_(weights).mul_(q.shape[-1] ** -0.5)
        del product
        grad_q = by_token(torch.bmm(slope, k), ctx.heads)
        grad_k = by_token(torch.bmm(slope.transpose(1, 2), q), ctx.heads, ctx.kv_heads)
        return grad_q, grad_k, grad_v, None


def by_head(x: Tensor, heads: int) -> Tensor:
    """(B, T, K, D) -> (B*H, T, D), a copy in which each of the K heads comes H / K times."""
    B, T, K, D = x.shape
    each = x.transpose(1, 2)[:, :, None].expand(B, K, heads // K, T, D)
    return each.reshape(B * heads, T, D).contiguous()  # a lone sequence would stay a view


def by_token(x: Tensor, heads: int, kv_heads: int | None = None) -> Tensor:
    """(B*H, T, D) -> (B, T, K, D), a copy; of the heads that share a kv head it is the sum."""
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < heads:
        x = x.view(-1, kv_heads, heads // kv_heads, *x.shape[1:]).sum(2)
    return x.view(-1, kv_heads, *x.shape[-2:]).transpose(1, 2).contiguous()

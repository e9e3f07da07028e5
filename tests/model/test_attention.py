"""Attention on the CPU against the softmax written out in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from snugpt.model.attention import attend, window_mask

B, D = 2, 8
SEED = 5


def heads(T: int, H: int, K: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, T, n, D, requires_grad=True) for n in (H, K, K)]


def visible(T: int, window: int | None) -> Tensor:
    query, key = torch.arange(T)[:, None], torch.arange(T)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def written_out(q, k, v, window=None, dropped=None, share=0.0) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / D**0.5
    weights = scores.masked_fill(~visible(q.shape[1], window), -torch.inf).softmax(-1)
    if dropped is not None:
        weights = weights * ~dropped.view(weights.shape) / (1 - share)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def assert_same(ours, textbook, inputs: list[Tensor]) -> None:
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    out = ours(*inputs)
    in_fp64 = [x.detach().double().requires_grad_() for x in inputs]
    wanted = textbook(*in_fp64)
    got = out, *torch.autograd.grad(out, inputs, upstream)
    right = wanted, *torch.autograd.grad(wanted, in_fp64, upstream.double())
    assert out.is_contiguous()
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("T", [1, 7, 33, 200])
def test_the_cpu_kernel_is_causal_softmax_attention_with_grouped_heads(T, kv_heads):
    assert_same(lambda *qkv: attend(*qkv, backend="cpu"), written_out, heads(T, 4, kv_heads))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [1, 5, 39])
def test_a_window_sees_so_many_tokens_back_and_no_more(window, kv_heads):
    T = 40
    mask = window_mask(T, window, torch.float32, torch.device("cpu"))

    def ours(q, k, v):
        return attend(q, k, v, backend="cpu", window=window, mask=mask)

    assert_same(ours, lambda *qkv: written_out(*qkv, window), heads(T, 4, kv_heads))


@pytest.mark.parametrize(("T", "window"), [(1, 1), (9, 1), (9, 4), (9, 9), (9, 20)])
def test_the_mask_is_zero_where_a_key_is_seen_and_minus_infinity_elsewhere(T, window):
    mask = window_mask(T, window, torch.float32, torch.device("cpu"))
    assert torch.equal(mask == 0, visible(T, window))
    assert torch.equal(mask == -torch.inf, ~visible(T, window))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("share", [1e-9, 0.3])
def test_math_attention_drops_weights_after_the_softmax(share, kv_heads):
    T, H = 17, 4

    def ours(q, k, v):
        torch.manual_seed(SEED)
        return attend(q, k, v, backend="math", dropout=share)

    torch.manual_seed(SEED)
    dropped = torch.empty(B * H, T, T, dtype=torch.bool).bernoulli_(share)
    assert dropped.any() == (share > 0.1)
    assert_same(ours, lambda *qkv: written_out(*qkv, None, dropped, share), heads(T, H, kv_heads))


def test_math_attention_without_dropout_is_the_tiled_kernel():
    q, k, v = heads(20, 2, 2)
    tiled = attend(q, k, v, backend="cpu")
    assert torch.equal(attend(q, k, v, backend="math"), tiled)

"""The chunked loss against F.cross_entropy on all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from snugpt.model.loss import HeadLoss, token_losses

N, C, VOCAB, PADDED = 37, 16, 50, 64
SCALE = 1 / 91


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    h = torch.randn(N, C, dtype=dtype, requires_grad=True)
    weight = torch.randn(PADDED, C, requires_grad=True)
    return h, weight, torch.randint(VOCAB, (N,))


def textbook(h, weight, targets, softcap, reduction="sum"):
    logits = F.linear(h, weight[:VOCAB])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction=reduction)


def loss_and_gradients(chunk: int, softcap: float | None):
    h, weight, targets = inputs()
    loss = HeadLoss.apply(h, weight, targets, VOCAB, softcap, chunk, SCALE)
    loss.backward()
    return loss.detach(), h.grad, weight.grad


@pytest.mark.parametrize("softcap", [None, 15.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 100])
def test_any_chunk_gives_the_loss_and_gradients_of_plain_cross_entropy(chunk, softcap):
    h, weight, targets = inputs()
    wanted = SCALE * textbook(h, weight, targets, softcap)
    wanted.backward()
    for got, right in zip(
        loss_and_gradients(chunk, softcap), (wanted.detach(), h.grad, weight.grad), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


def by_hand(h, weight, targets, softcap):
    """Loss and both gradients in fp64 from their definitions, one token at a time, no autograd."""
    h, weight = h.detach().double(), weight.detach().double()
    loss, grad_h, grad_weight = 0.0, torch.zeros_like(h), torch.zeros_like(weight)
    for row, target in enumerate(targets.tolist()):
        logits = weight[:VOCAB] @ h[row]
        slope = torch.ones_like(logits)
        if softcap is not None:
            bent = torch.tanh(logits / softcap)
            logits, slope = softcap * bent, 1 - bent**2
        powers = torch.exp(logits - logits.max())
        probability = powers / powers.sum()
        loss -= SCALE * torch.log(probability[target])
        grad = SCALE * slope * (probability - torch.eye(VOCAB, dtype=torch.float64)[target])
        grad_h[row] = grad @ weight[:VOCAB]
        grad_weight[:VOCAB] += torch.outer(grad, h[row])
    return loss, grad_h, grad_weight


@pytest.mark.parametrize("softcap", [None, 15.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 7, 37])
def test_loss_and_gradients_are_those_of_fp64_by_hand(chunk, softcap):
    found = loss_and_gradients(chunk, softcap)
    for got, right in zip(found, by_hand(*inputs(), softcap), strict=True):
        error = torch.linalg.vector_norm(got.double() - right) / torch.linalg.vector_norm(right)
        assert error < 1e-6, error


@pytest.mark.parametrize("softcap", [None, 15.0])
def test_padded_rows_of_the_head_get_no_gradient_and_no_probability(softcap):
    _, _, grad = loss_and_gradients(10, softcap)
    assert grad.shape == (PADDED, C)
    assert not grad[VOCAB:].any()
    assert grad[:VOCAB].any(1).all()


def test_the_gradient_from_above_is_multiplied_in():
    h, weight, targets = inputs()
    (3 * HeadLoss.apply(h, weight, targets, VOCAB, None, 8, SCALE)).backward()
    _, grad_h, grad_weight = loss_and_gradients(8, None)
    torch.testing.assert_close((h.grad, weight.grad), (3 * grad_h, 3 * grad_weight))


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("chunk", [1, 7, 37, 100])
def test_the_evaluations_losses_are_those_of_each_token(chunk, softcap):
    h, weight, targets = inputs()
    with torch.no_grad():
        got = token_losses(h, weight, targets, VOCAB, softcap, chunk)
        torch.testing.assert_close(got, textbook(h, weight, targets, softcap, "none"))


def test_extreme_logits_overflow_nothing():
    h = torch.full((3, C), 100.0, requires_grad=True)
    weight = torch.zeros(PADDED, C)
    weight[1], weight[2] = 10.0, -10.0
    weight.requires_grad_()
    loss = HeadLoss.apply(h, weight, torch.tensor([1, 2, 1]), VOCAB, None, 2, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2 * 100 * 10 * C)
    assert h.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_in_bf16_the_heads_gradient_is_summed_in_fp32():
    h, weight, targets = inputs()
    textbook(h, weight, targets, 15.0).backward()
    low = h.detach().bfloat16().requires_grad_()
    head = weight.detach().clone().requires_grad_()
    HeadLoss.apply(low, head, targets, VOCAB, 15.0, 5, 1.0).backward()
    assert (low.grad.dtype, head.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(head.grad, weight.grad, rtol=0.05, atol=0.05)
    torch.testing.assert_close(low.grad.float(), h.grad, rtol=0.05, atol=0.05)

"""Cross-entropy fused with the output head, in chunks: the full logits never exist.

The logits of N tokens are N x V, the largest tensor of a small GPT (d12, B 32, T 2048: 4 GiB in
bf16, 8 GiB in fp32). Here a chunk of rows is multiplied with the head, turned into its loss and its
gradient, and dropped before the next chunk. The gradients are made in the forward pass, where
everything they need is at hand, and only handed out in the backward pass. One chunk of all rows is
the plain loss.

Chunking by rows does not change a single product, only the order in which the head's gradient is
summed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class HeadLoss(Function):
    """`scale` x sum of the cross-entropies of h @ weight.T against the targets, in nats.

    h (N, C), weight (V, C), targets (N,) int64 -> () fp32. Rows of the weight from `vocab_size` on
    are padding. Keeps the two gradients, (N, C) and (V, C). The weight's is summed over the chunks
    in fp32 and rounded once, where the weight is bf16.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, vocab_size: int, softcap, chunk: int, scale):
        head = weight[:vocab_size].to(h.dtype)  # (V, C); no copy where it is stored in it
        grad_h = torch.empty_like(h)
        total = torch.zeros_like(weight, dtype=torch.float32)
        loss = torch.zeros((), device=h.device)
        for start in range(0, h.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = capped_logits(h[rows], head, softcap)  # (n, V) fp32
            loss += softmax_and_loss(logits, targets[rows], softcap)
            grad_logits = logits.mul_(scale).to(h.dtype)
            del logits
            torch.mm(grad_logits, head, out=grad_h[rows])
            accumulate_product(total[:vocab_size], grad_logits, h[rows])
            del grad_logits
        ctx.grads = grad_h, total.to(weight.dtype)
        return loss.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad_h, grad_weight = ctx.grads
        ctx.grads = None
        return grad_h.mul_(grad), grad_weight.mul_(grad), None, None, None, None, None


def token_losses(h, weight, targets, vocab_size: int, softcap, chunk: int) -> Tensor:
    """The cross-entropy of each token in nats, without gradients: (N, C), ... -> (N,) fp32."""
    head = weight[:vocab_size].to(h.dtype)
    losses = torch.empty(h.shape[0], device=h.device)
    for start in range(0, h.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits = capped_logits(h[rows], head, softcap)
        right = logits.gather(1, targets[rows, None])  # (n, 1)
        highest = logits.amax(1, keepdim=True)
        total = logits.sub_(highest).exp_().sum(1, keepdim=True)
        losses[rows] = total.log_().add_(highest).sub_(right)[:, 0]
        del logits, right, highest, total
    return losses


def capped_logits(h: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    """h @ head.T in fp32, softly held within +-softcap: (n, C), (V, C) -> (n, V)."""
    logits = (h @ head.t()).float()
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def softmax_and_loss(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Turn (n, V) logits into their gradient in place; return the summed loss.

    d loss / d logit = p - [target]; through z = c * tanh(l / c) times 1 - (z / c) ** 2.
    """
    right = logits.gather(1, targets[:, None])  # (n, 1)
    highest = logits.amax(1, keepdim=True)
    probability = logits.clone() if softcap else logits
    total = probability.sub_(highest).exp_().sum(1, keepdim=True)
    probability.div_(total).scatter_add_(1, targets[:, None], torch.full_like(right, -1.0))
    if softcap:
        logits.div_(softcap).square_().neg_().add_(1).mul_(probability)
    return total.log_().add_(highest).sub_(right).sum()


def accumulate_product(total: Tensor, grad_logits: Tensor, h: Tensor) -> None:
    """total (V, C) fp32 += grad_logits.T @ h, summed in fp32 whatever the inputs are."""
    if h.dtype == total.dtype:
        total.addmm_(grad_logits.t(), h)
    else:
        total.add_(grad_logits.t() @ h)

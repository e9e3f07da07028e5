"""Muon: momentum whose update is orthogonalised by a Newton-Schulz iteration, matrix by matrix.

kellerjordan.github.io/posts/muon. The gradient's own storage takes the Nesterov blend; what one
matrix needs beside it is let go before the next, so the largest matrix sets the transient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snugpt.estimate.updating import NEWTON_SCHULZ_STEPS, row_stretches
from snugpt.model.parameter_wise import ParameterWise, store
from snugpt.model.stored_state import Fp32, State

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Muon (Jordan et al., 2024)
MOMENTUM = "momentum"


Whole = Callable[[Tensor, Tensor], tuple[Tensor, slice]]  # `FullySharded.whole`


class Muon(ParameterWise):
    """One momentum for each matrix."""

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
        whole: Whole | None = None,
        **stored: Any,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults, **stored)
        self.dtype = dtype  # of the iteration; None is the weights' own
        self.whole = whole  # gathers a matrix of which the parameter is some rows

    def empty_state(self, weight: Tensor, device: torch.device) -> State:
        return self.formats[weight].zeros(MOMENTUM, weight, device)

    @torch.no_grad()
    def update(self, weight: Tensor, group: dict[str, Any]) -> None:
        chance = self.chance_of(weight)
        self._blend(weight, group["momentum"])
        update, shape = self._direction(weight)
        if self.taken is not None:
            update.mul_(self.taken)
        # An orthogonal (O, I) matrix has root mean square 1 / sqrt(max(O, I)); tall ones are
        # raised.
        raised = max(1.0, shape[0] / shape[1]) ** 0.5
        for rows in row_stretches(*weight.shape, whole=weight.dtype != torch.bfloat16):
            part = weight[rows]
            value = part.float() if part.dtype == torch.bfloat16 else part
            value.mul_(1 - self.share(group["lr"] * group["weight_decay"]))
            value.add_(update[rows], alpha=-group["lr"] * raised)
            store(part, value, chance)
            del value

    def _direction(self, weight: Tensor) -> tuple[Tensor, torch.Size]:
        """The update of a parameter, and the shape of the whole matrix it belongs to."""
        if self.whole is None:
            if self.dtype == torch.float16:  # would lose small numbers before they are scaled
                weight.grad.div_(weight.grad.norm() + 1e-7)
            return orthogonalised(weight.grad, self.dtype), weight.shape
        matrix, rows = self.whole(weight, weight.grad.to(self.dtype or weight.dtype))
        return orthogonalised(matrix, self.dtype)[rows], matrix.shape

    def _blend(self, weight: Tensor, beta: float) -> None:
        """Take the gradient into the momentum, and the momentum into the gradient."""
        stored = self.formats[weight]
        in_place = isinstance(stored, Fp32) and weight.dtype != torch.bfloat16
        for stretch, state, moments in self.stretches_of(weight, whole=in_place):
            part = weight.grad.view(-1)[stretch]
            grad = part.float() if part.dtype == torch.bfloat16 else part
            momentum = stored.read(state, MOMENTUM, moments).lerp_(grad, self.share(1 - beta))
            grad.lerp_(momentum, beta)
            if grad is not part:
                part.copy_(grad)
            del grad
            stored.write(state, MOMENTUM, moments, momentum, self.taken)
            del momentum


def orthogonalised(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The nearest orthogonal matrix, roughly: singular values end between 0.7 and 1.2.

    Worked out and returned in `dtype`, the matrix's own by default. Overwrites nothing.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(matrix.dtype if dtype is None else dtype)
    if x.shape[0] > x.shape[1]:
        x = x.t()
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.t()  # (m, m), m the smaller side
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        del gram
        x = torch.addmm(x, polynomial, x, beta=a)
        del polynomial
    return x if matrix.shape == x.shape else x.t()

"""Optimizers: Muon for the matrices, PyTorch's fused AdamW for everything else.

State per parameter: Muon one fp32 momentum (4 bytes), AdamW two fp32 moments (8 bytes).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from snugpt.model.build import group_of
from snugpt.model.gpt import GPT
from snugpt.spec.recipe import TrainingRecipe

ADAMW_BETAS = (0.8, 0.95)
ADAMW_EPS = 1e-8
# Scales of the AdamW rate by group; width-dependent parts as in nanochat's base_train (July 2026)
EMBEDDING_RATE, VALUE_EMBEDDING_RATE, HEAD_RATE = 30.0, 15.0, 1.0
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of Muon (Jordan et al., 2024)


Whole = Callable[[Tensor, Tensor], tuple[Tensor, slice]]  # see `FullySharded.whole`


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by a Newton-Schulz iteration, one matrix at a time.

    kellerjordan.github.io/posts/muon. The gradient's own storage takes the Nesterov blend; what one
    matrix needs beside it is let go before the next, so the largest matrix sets the transient.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
        whole: Whole | None = None,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype  # of the iteration; None is the weights' own
        self.whole = whole  # gathers a matrix of which the parameter is some rows

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, grad: Tensor, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        blend = grad.lerp_(momentum, group["momentum"])
        matrix, rows = blend, slice(None)
        if self.whole is not None:
            matrix, rows = self.whole(weight, blend.to(self.dtype or blend.dtype))
        update = orthogonalised(matrix, self.dtype)[rows]
        # An orthogonal (O, I) matrix has root mean square 1 / sqrt(max(O, I)); tall ones are
        # raised.
        raised = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * raised)


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


def optimizers_for(model: GPT, recipe: TrainingRecipe) -> list[torch.optim.Optimizer]:
    """The optimizers of a recipe; together they own every parameter once."""
    schedule = recipe.schedule
    groups: dict[str, list[Tensor]] = {}
    for name, weight in model.ranks.parameters(model).items():
        groups.setdefault(group_of(name), []).append(weight)
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.optimizer == "muon":
        on_cuda = model.runtime.device == "cuda"  # where bf16 is fast
        optimizers.append(
            Muon(
                groups.pop("matrices"),
                schedule.matrix_learning_rate,
                weight_decay=schedule.weight_decay,
                dtype=torch.bfloat16 if on_cuda else None,
                whole=model.ranks.whole,
            )
        )
    scales = {"embedding": EMBEDDING_RATE, "value_embedding": VALUE_EMBEDDING_RATE}
    if recipe.optimizer == "adamw" or model.shape.tied_embeddings:
        scales = {}
    adamw = [
        {
            "params": weights,
            "lr": schedule.learning_rate * scales.get(group, HEAD_RATE),
            "weight_decay": schedule.weight_decay if group == "matrices" else 0.0,
        }
        for group, weights in groups.items()
    ]
    optimizers.append(torch.optim.AdamW(adamw, betas=ADAMW_BETAS, eps=ADAMW_EPS, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers

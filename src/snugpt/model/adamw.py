"""AdamW (arXiv 1711.05101), one parameter at a time.

Where weight and moments are fp32, PyTorch's fused kernel does it all and needs nothing beside.
Else a stretch of the parameter is brought to fp32, updated and stored again, then the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snugpt.model.parameter_wise import ParameterWise, store
from snugpt.model.stored_state import Fp32, State

FIRST, SECOND = "exp_avg", "exp_avg_sq"  # moments, by the names PyTorch gives them


class AdamW(ParameterWise):
    """Two moments and a counter for each parameter."""

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **stored: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **stored)

    def empty_state(self, weight: Tensor, device: torch.device) -> State:
        stored = self.formats[weight]
        moments = stored.zeros(FIRST, weight, device) | stored.zeros(SECOND, weight, device)
        return {"step": torch.zeros((), device=device), **moments}  # counted where it is read

    @torch.no_grad()
    def update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state_of(weight)
        state["step"].add_(self.share(1))
        if isinstance(self.formats[weight], Fp32) and weight.dtype != torch.bfloat16:
            self._fused(weight, group)
        else:
            self._by_stretches(weight, group)

    def _fused(self, weight: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for stretch, state, part in self.stretches_of(weight, whole=True):
            torch._fused_adamw_(
                [weight.view(-1)[stretch]], [weight.grad.view(-1)[stretch]],
                [state[FIRST].view(-1)[part]], [state[SECOND].view(-1)[part]], [], [state["step"]],
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
                eps=group["eps"], amsgrad=False, maximize=False,
                found_inf=self.overflow,
            )  # fmt: skip

    def _by_stretches(self, weight: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        stored, chance = self.formats[weight], self.chance_of(weight)
        steps = self.state_of(weight)["step"]
        if self.taken is not None:
            steps = steps.clamp(min=1)  # the first step may be one that is not taken
        bias1, bias2 = (1 - beta**steps for beta in (beta1, beta2))
        del steps
        bias2.sqrt_()
        for stretch, state, moments in self.stretches_of(weight, whole=False):
            grad = weight.grad.view(-1)[stretch].float()  # (n,), the gradient itself if it is fp32
            first = stored.read(state, FIRST, moments).lerp_(grad, self.share(1 - beta1))
            second = stored.read(state, SECOND, moments)
            second.mul_(beta2 if self.taken is None else 1 - self.share(1 - beta2))
            second.addcmul_(grad, grad, value=1 - beta2)
            del grad
            # lr m / b1 / (sqrt(v) / b2 + eps): the first bias is taken to the denominator
            denominator = second.sqrt().div_(bias2).add_(group["eps"]).mul_(bias1)
            if self.taken is not None:
                denominator.div_(self.taken)  # by infinity nothing is changed
            part = weight.view(-1)[stretch]
            value = part.float()
            value.mul_(1 - self.share(group["lr"] * group["weight_decay"]))
            value.addcdiv_(first, denominator, value=-group["lr"])
            del denominator
            store(part, value, chance)
            del value
            stored.write(state, FIRST, moments, first, self.taken)
            del first
            stored.write(state, SECOND, moments, second, self.taken)
            del second

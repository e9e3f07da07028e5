"""The scale of a loss in fp16, which holds nothing below 6e-8 and nothing above 65504.

The loss is multiplied by a large number, so that small gradients do not vanish, and the gradients
are divided by it once they are all there, in fp32. Where one overflowed the step is not taken and
the scale is halved; after GROWTH_STEPS steps without overflow it is doubled. The numbers are those
of PyTorch's GradScaler (torch/amp/grad_scaler.py). Unlike it nothing here waits for the device:
the optimizers multiply what they change by whether the step is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from snugpt.model.parameter_wise import ParameterWise

START = 2.0**16
GROWTH, BACKOFF, GROWTH_STEPS = 2.0, 0.5, 2000
CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grad_norm_


class LossScale:
    """Three numbers on the device: the scale, the steps since it last changed, those not taken."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), START, device=device)  # fp32
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def settle(
        self,
        weights: Iterable[Tensor],
        clip_norm: float,
        optimizers: Sequence[ParameterWise],
        loss: Tensor,
    ) -> None:
        """Unscale `loss` and the gradients, clip these (0: do not), and choose the next scale.

        After an overflow all gradients are 0 and the optimizers change nothing.
        """
        grads = [weight.grad for weight in weights if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)  # of the scaled gradients, ()
        taken = norm.isfinite().float()
        factor = self.scale.reciprocal()
        loss.mul_(factor)
        if clip_norm:
            factor.mul_((clip_norm / (norm * factor).add_(CLIP_EPS)).clamp_(max=1))
        factor.mul_(taken)
        for grad in grads:
            grad.mul_(factor).nan_to_num_(0.0, 0.0, 0.0)  # 0 x infinity is no number
        overflow = 1 - taken
        for optimizer in optimizers:
            optimizer.taken, optimizer.overflow = taken, overflow
        self.skipped_steps.add_(overflow.long())
        torch._amp_update_scale_(
            self.scale, self.good_steps, overflow, GROWTH, BACKOFF, GROWTH_STEPS
        )

    def numbers(self) -> list[float]:
        """Scale, steps since it changed, steps not taken; waits for the device."""
        return [self.scale.item(), self.good_steps.item(), self.skipped_steps.item()]

    def put_back(self, numbers: Sequence[float]) -> None:
        """Go on with what `numbers` said."""
        for tensor, number in zip(
            (self.scale, self.good_steps, self.skipped_steps), numbers, strict=True
        ):
            tensor.fill_(number)

"""Rounding to bf16 by chance: up as often as the value is near the upper neighbour.

bf16 keeps 8 bits of a number, so an update below 1/512 of a weight would be lost each time it is
added and rounded to nearest. Rounded by chance it is added in full about as often as it should be:
the expected value is the exact one (arXiv 2010.06192). An fp32 number is a bf16 number followed by
16 bits: adding a random 16-bit integer carries into the bf16 part with just that chance, and what
is left of the 16 bits is cut off.

The chance is drawn from (seed, step, parameter), never from what was drawn before: a resumed run
rounds as one that was not stopped, and so does a step that visits parameters in another order.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor


def round_by_chance_(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round contiguous fp32 in place so that each value fits bf16; inf and nan stay what they are.

    Beside x there is an int32 and, for a moment, a bool of its shape.
    """
    noise = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    noise.random_(0, 1 << 16, generator=generator)
    noise.masked_fill_(x.isnan(), 0)  # CUDA's nan is all ones: it would overflow into a zero
    x.view(torch.int32).add_(noise).bitwise_and_(-(1 << 16))
    return x


class Chance:
    """One generator per device, seeded anew for every parameter of every step."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}

    def of(self, weight: Tensor, name: str, num_steps: int) -> torch.Generator:
        """The generator for the update of one parameter after `num_steps` steps."""
        device = "cpu" if weight.is_meta else str(weight.device)
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        key = f"{self.seed}/{num_steps}/{name}".encode()
        return generator.manual_seed(int.from_bytes(blake2b(key, digest_size=7).digest()))

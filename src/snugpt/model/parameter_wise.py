"""An optimizer that updates one parameter at a time.

In which order parameters are visited is told apart from what is done to one: `step` visits all
whose gradient is there, the backward pass may call `update` for each as soon as its gradient is
complete (`model/step.py`). What an update needs beside the state is gone before the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from snugpt.estimate.state_on_host import moves_state
from snugpt.estimate.updating import stretches
from snugpt.model.state_on_host import StateOnHost, Stretch
from snugpt.model.stochastic_rounding import Chance, round_by_chance_
from snugpt.model.stored_state import Format, Fp32, State

WITHOUT_MEMORY = torch.device("meta")


class ParameterWise(torch.optim.Optimizer):
    """What Muon and AdamW share: whose state is stored how, and what has been done so far.

    `formats` says how the moments of a parameter are stored, fp32 where nothing is said, `names`
    what it is called. `num_steps` steps were taken before; rounding by chance is drawn from it.
    """

    def __init__(
        self,
        params,
        defaults: dict[str, Any],
        *,
        formats: Mapping[Tensor, Format] | None = None,
        names: Mapping[Tensor, str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(params, defaults)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        plain = Fp32()
        self.formats = {w: (formats or {}).get(w, plain) for w in weights}
        self.names = {w: (names or {}).get(w, str(i)) for i, w in enumerate(weights)}
        self.chance, self.num_steps = Chance(seed), 0
        # 1 or 0 and the other way round, where only the device knows whether a step is taken
        self.taken: Tensor | None = None
        self.overflow: Tensor | None = None
        self.on_host: StateOnHost | None = None  # the lever `offload = optimizer`

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter whose gradient is there, and count the step."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, group)
        self.num_steps += 1
        if self.on_host is not None:
            self.on_host.end_step()

    @torch.no_grad()
    def update(self, weight: Tensor, group: dict[str, Any]) -> None:
        """Take the step of one parameter of a group; its gradient's storage may be overwritten."""
        raise NotImplementedError

    def empty_state(self, weight: Tensor, device: torch.device) -> State:
        """The state of a parameter before its first step, on any device."""
        raise NotImplementedError

    @torch.no_grad()
    def state_of(self, weight: Tensor) -> State:
        """The state of a parameter, made where there is none yet."""
        state = self.state[weight]
        if not state and self.moves(weight):
            self.on_host.place([(state, self.empty_state(weight, WITHOUT_MEMORY))])
        elif not state:
            state.update(self.empty_state(weight, weight.device))
        return state

    def share(self, change: float) -> float | Tensor:
        """A change as it is, or 0 in a step that is not taken."""
        return change if self.taken is None else self.taken * change

    def moves(self, weight: Tensor) -> bool:
        """Whether the moments of a parameter lie on the host."""
        return self.on_host is not None and moves_state(weight.numel())

    def stretches_of(self, weight: Tensor, *, whole: bool) -> Iterator[Stretch]:
        """The stretches that a parameter is updated by, each with its state on the device.

        With `whole` it is one, unless the state has to be brought here.
        """
        state = self.state_of(weight)
        if self.moves(weight):
            yield from self.on_host.stretches(weight, state)
        else:
            for part in stretches(weight.numel(), whole=whole):
                yield Stretch(part, state, part)

    def chance_of(self, weight: Tensor) -> torch.Generator:
        """The chance by which this step rounds what belongs to one parameter."""
        return self.chance.of(weight, self.names[weight], self.num_steps)


def store(part: Tensor, value: Tensor, chance: torch.Generator) -> None:
    """Write fp32 back to the part of a weight it was read from with `.float()`."""
    if part.dtype == torch.bfloat16:
        part.copy_(round_by_chance_(value, chance))

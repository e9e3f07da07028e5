"""The lever `offload = optimizer`: moments lie in host memory and visit the device in stretches.

    fetch    the moments of a stretch of one parameter, into one of two buffers on the device
    update   there, by the same operations as anywhere; meanwhile the next stretch is fetched
    return   back to their place on the host, while the one after that is updated

The two buffers are all that the moments take of the device. Each byte of state crosses the bus
twice a step. The other way, sending gradients to the host and updating there (ZeRO-Offload, arXiv
2101.06840), moves less for AdamW, but Muon's iteration, 5 x (4 m^2 n + 2 m^3) operations for each
matrix, is far too much for a CPU; and what the CPU rounds is not what the GPU rounds.

Which parameter follows is what followed it in the step before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from snugpt.estimate.host import ALIGNMENT_BYTES
from snugpt.estimate.state_on_host import NUM_STAGES
from snugpt.estimate.updating import stretches
from snugpt.model.copies import copies_for
from snugpt.model.host_memory import HostPool
from snugpt.model.stored_state import State
from snugpt.units import round_up


class Stretch(NamedTuple):
    """A stretch of a flattened parameter, and its state: where it is, and which part of that."""

    of_weight: slice
    state: State
    of_state: slice


class Stage:
    """One of the two buffers: what was fetched into it, and the events of its copies."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.holds: tuple[Tensor, slice] | None = None
        self.state: State = {}
        self.arrived = self.returned = None


class StateOnHost:
    """Where the moments of all parameters lie, and how they come to the device.

    One for all optimizers of a model: they take turns with the same two buffers.
    """

    def __init__(self, stage_bytes: int, device: torch.device) -> None:
        self.device, self.copies = device, copies_for(device)
        self.stages = [Stage(stage_bytes, device) for _ in range(NUM_STAGES)]
        self._pool = HostPool(device)
        self._turn = 0
        self._before: Tensor | None = None
        self._next: dict[Tensor, tuple[Tensor, State]] = {}  # who followed whom, with its state

    def place(self, states: Iterable[tuple[State, Mapping[str, Tensor]]]) -> None:
        """Give every moment its place on the host, zero; counters stay on the device.

        Each state comes with tensors without memory that say what is to lie there. The largest go
        first, which wastes least and needs no order of the parameters.
        """
        wanted = [(state, name, like) for state, made in states for name, like in made.items()]
        for state, name, like in sorted(wanted, key=lambda each: -each[2].nbytes):
            if like.dim() == 0:
                state[name] = torch.zeros_like(like, device=self.device)
                continue
            flat = self._pool.take(like.nbytes).zero_()
            state[name] = flat.view(like.dtype).view(like.shape)

    def stretches(self, weight: Tensor, state: State) -> Iterator[Stretch]:
        """Yield the stretches of one parameter with their state on the device."""
        if self._before is not None:
            self._next[self._before] = weight, state
        self._before = weight
        parts = list(stretches(weight.numel()))
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            stage = self.stages[self._turn]
            self._turn = 1 - self._turn
            self._fetch(stage, weight, state, part)
            if following is not None:
                self._fetch(self.stages[self._turn], weight, state, following)
            elif weight in self._next:
                self._fetch_first(*self._next[weight])
            self.copies.wait(stage.arrived)
            yield Stretch(part, stage.state, slice(0, part.stop - part.start))
            self._return(stage, state, part)

    def end_step(self) -> None:
        """Let nothing that is computed after this begin before all state is back on the host."""
        for stage in self.stages:
            self.copies.wait(stage.returned)
            stage.holds = None  # it may be another state's when the next step begins
        if self._before is not None:
            self._next.pop(self._before, None)
        self._before = None

    def _fetch_first(self, weight: Tensor, state: State) -> None:
        first = next(stretches(weight.numel()))
        self._fetch(self.stages[self._turn], weight, state, first)

    def _fetch(self, stage: Stage, weight: Tensor, state: State, part: slice) -> None:
        if stage.holds is not None and stage.holds[0] is weight and stage.holds[1] == part:
            return
        stage.holds, stage.state = (weight, part), dict(state)
        pairs, start = [], 0
        for name, like in state.items():
            if like.dim() == 0:
                continue  # a counter, which stays on the device
            rows = _part_of(like, weight, part)
            on_device = stage.buffer[start : start + rows.nbytes].view(like.dtype)
            start += round_up(rows.nbytes, ALIGNMENT_BYTES)
            stage.state[name] = on_device
            pairs.append((_bytes(rows), _bytes(on_device)))
        stage.arrived = self.copies.to_device(pairs, after=stage.returned)

    def _return(self, stage: Stage, state: State, part: slice) -> None:
        weight = stage.holds[0]
        for name, like in state.items():
            if like.dim():
                rows = _part_of(like, weight, part)
                self.copies.to_host(_bytes(stage.state[name]), _bytes(rows))
        stage.returned = self.copies.sent()
        stage.holds = None


def _part_of(moment: Tensor, weight: Tensor, part: slice) -> Tensor:
    """What belongs to a stretch of the weight: of scales, one for a block of elements."""
    each = weight.numel() // moment.numel()
    return moment.view(-1)[part.start // each : part.stop // each]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)

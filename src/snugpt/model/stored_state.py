"""How an optimizer's moments lie in memory: fp32, bf16, or 8 bits with a scale per 256 elements.

A moment is named in the state of its parameter; `read` gives a stretch of it in fp32 and `write`
stores it again. Everything an update does in between is the same for all formats.

int8 is block-wise dynamic quantisation (arXiv 2110.02861) as torchao 0.18.0 has it: each block of
256 is divided by its largest magnitude, each element becomes the number of the nearest of 256
values. The values are torchao's; the nearest is found by a search between their midpoints, which
needs 4 bytes per element instead of the 30 of torchao's own eight comparisons.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from snugpt.errors import FailedError
from snugpt.estimate.updating import BLOCK_ELEMENTS

State = dict[str, Tensor]
SMALLEST_SCALE = 1e-12


class Format(Protocol):
    """How the moments of one parameter are stored."""

    def zeros(self, name: str, weight: Tensor, device: torch.device) -> State:
        """The tensors of one moment at the start, by their names in the state."""
        ...

    def read(self, state: State, name: str, stretch: slice) -> Tensor:
        """Some elements of the flattened moment as fp32: a view of it where it is fp32."""
        ...

    def write(
        self,
        state: State,
        name: str,
        stretch: slice,
        value: Tensor,
        taken: Tensor | None = None,
    ) -> None:
        """Store what `read` gave and an update changed; the value may be overwritten.

        `taken` is 0 on the device if the step is not taken: the update has changed nothing then.
        """
        ...


class Fp32:
    """Moments as they are: 4 bytes an element, changed in place."""

    def zeros(self, name: str, weight: Tensor, device: torch.device) -> State:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return {name: torch.zeros(weight.shape, dtype=dtype, device=device)}

    def read(self, state: State, name: str, stretch: slice) -> Tensor:
        return state[name].view(-1)[stretch]

    def write(self, state, name, stretch, value, taken=None) -> None:
        pass


class Bf16:
    """2 bytes an element, rounded to nearest: with betas up to 0.95 a step moves a moment by more
    than its last bit (bench/rounding.py: chance was no better)."""

    def zeros(self, name: str, weight: Tensor, device: torch.device) -> State:
        return {name: torch.zeros(weight.shape, dtype=torch.bfloat16, device=device)}

    def read(self, state: State, name: str, stretch: slice) -> Tensor:
        return state[name].view(-1)[stretch].float()

    def write(self, state, name, stretch, value, taken=None) -> None:
        state[name].view(-1)[stretch].copy_(value)


class Int8:
    """1 byte an element and 4 for each block of 256. `signed` has a sign bit, else a finer grid."""

    def __init__(self) -> None:
        self.tables: dict[tuple[bool, torch.device], tuple[Tensor, Tensor]] = {}

    def zeros(self, name: str, weight: Tensor, device: torch.device) -> State:
        blocks = weight.numel() // BLOCK_ELEMENTS
        return {
            name: torch.zeros(weight.shape, dtype=torch.uint8, device=device),
            f"{name}_scale": torch.zeros(blocks, device=device),
        }

    def read(self, state: State, name: str, stretch: slice) -> Tensor:
        codes = state[name].view(-1)[stretch].int()
        values, _ = self.table(name, codes.device)
        moment = torch.index_select(values, 0, codes)
        del codes
        moment.view(-1, BLOCK_ELEMENTS).mul_(self._scales(state, name, stretch))
        return moment

    def write(self, state, name, stretch, value, taken=None) -> None:
        blocks, scales = value.view(-1, BLOCK_ELEMENTS), self._scales(state, name, stretch)
        if taken is None:
            torch.linalg.vector_norm(blocks, torch.inf, dim=1, keepdim=True, out=scales)
        else:  # the largest that is read back may be less than was stored: the grid has no -1
            scales.lerp_(torch.linalg.vector_norm(blocks, torch.inf, dim=1, keepdim=True), taken)
        blocks.div_(scales.clamp_(SMALLEST_SCALE))
        _, midpoints = self.table(name, value.device)
        state[name].view(-1)[stretch].copy_(
            torch.bucketize(value, midpoints, right=True, out_int32=True)
        )

    def table(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """The 256 values and their 255 midpoints, fp32; a mean of squares has no sign."""
        signed = name != "exp_avg_sq"
        found = self.tables.get((signed, device))
        if found is None:
            grid = dynamic_map(signed)
            values = torch.tensor(grid, device=device)
            halves = [(low + high) / 2 for low, high in pairwise(grid)]
            found = self.tables[signed, device] = values, torch.tensor(halves, device=device)
        return found

    def _scales(self, state: State, name: str, stretch: slice) -> Tensor:
        blocks = slice(stretch.start // BLOCK_ELEMENTS, stretch.stop // BLOCK_ELEMENTS)
        return state[f"{name}_scale"][blocks].view(-1, 1)


def dynamic_map(signed: bool) -> list[float]:
    """torchao's 256 values between -1 (or 0) and 1, fine near zero and coarse near one.

    Raises:
        FailedError: torchao is not installed.
    """
    require_torchao()
    with _quiet():
        from torchao.optim.quant_utils import create_dynamic_map
    return create_dynamic_map(signed=signed)


def require_torchao() -> None:
    """Raise FailedError if torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise FailedError(
            "state_dtype = 'int8' needs torchao, which is not installed",
            hint="pip install 'snugpt[lowbit]'",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao complains on import about kernels that were built for other PyTorch versions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

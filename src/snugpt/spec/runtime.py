"""Runtime: what the same recipe turns into on a device: kernels, number format, rounding.

The estimate and the model read the same object, so that they cannot choose different kernels.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from snugpt.spec.gpu import Gpu
from snugpt.spec.recipe import ComputeDtype
from snugpt.units import round_up

Attention = Literal["cpu", "math", "flash", "efficient"]

FIRST_BF16 = (8, 0)  # CUDA capability of Ampere
CUDA_BLOCK_BYTES = 512  # kMinBlockSize of PyTorch's CUDA caching allocator


MASK_MULTIPLE = 8  # rows of a mask begin at 16 bytes, as the memory-efficient kernel wants them


def mask_columns(num_keys: int) -> int:
    """Columns that a mask over `num_keys` keys is stored with."""
    return round_up(num_keys, MASK_MULTIPLE)


class Runtime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one device runs the model.

    `attention`: flash (windows and grouped heads inside the kernel) on CUDA 8.0 and up in bf16,
    efficient (masks, repeated heads) elsewhere on CUDA, the tiled kernel of the CPU, and math where
    that kernel has no dropout. `num_threads` sizes the CPU kernels' scratch.
    """

    device: Literal["cpu", "cuda"]
    attention: Attention
    num_threads: int = 1
    capability: tuple[int, int] | None = None

    @property
    def block_bytes(self) -> int:
        """Every tensor is rounded up to a multiple of this many bytes."""
        return CUDA_BLOCK_BYTES if self.device == "cuda" else 1


def runtime_for(
    gpu: Gpu, compute_dtype: ComputeDtype, dropout: float = 0.0, num_threads: int = 1
) -> Runtime:
    """Return what `gpu` runs attention with; Apple's GPUs are predicted by CUDA's masked rules."""
    if gpu.backend == "cpu":
        attention: Attention = "math" if dropout else "cpu"
        return Runtime(device="cpu", attention=attention, num_threads=num_threads)
    flash = gpu.capability is not None and gpu.capability >= FIRST_BF16 and compute_dtype == "bf16"
    return Runtime(
        device="cuda",
        attention="flash" if flash else "efficient",
        capability=gpu.capability,
    )

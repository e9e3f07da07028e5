"""Gpu: one row of the catalogue, or the machine at hand."""

from __future__ import annotations

from typing import Literal

import msgspec

Dtype = Literal["fp32", "tf32", "fp16", "bf16", "fp8"]
Backend = Literal["cuda", "cpu", "mps", "rocm"]


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device that holds and runs a model.

    `memory_bytes` is what the driver reports as total; `usable_bytes` what a process can have of it.
    `flops` are dense rates (no structured sparsity) in FLOP/s per number format; a format the device
    has no fast path for is absent.
    """

    id: str
    name: str
    backend: Backend
    memory_bytes: int
    usable_bytes: int
    bandwidth_bytes_per_s: float
    flops: dict[Dtype, float]
    capability: tuple[int, int] | None = None  # CUDA compute capability
    unified: bool = False  # memory shared with the CPU
    num_multiprocessors: int | None = None
    pytorch: str = ""  # which PyTorch builds still hold kernels for it
    aliases: tuple[str, ...] = ()
    source: str = ""  # address of the page the figures were read on, or "recalled"
    date: str = ""  # the day it was read

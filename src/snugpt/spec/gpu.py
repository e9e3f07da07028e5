"""Gpu: one row of the catalogue, or the machine at hand."""

from __future__ import annotations

from typing import Literal

import msgspec

Dtype = Literal["fp32", "tf32", "fp16", "bf16", "fp8"]
Backend = Literal["cuda", "cpu", "mps", "rocm"]


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device that holds and runs a model.

    `memory_bytes` is what the driver reports as total, `usable_bytes` what a process can have of
    it. `bandwidth_bytes_per_s` is the peak of the device memory. `flops` are dense rates (no
    structured sparsity, fp32 accumulation) in FLOP/s per number format; a format the device has no
    fast path for is absent.

    `host_link_bytes_per_s` and `peer_link_bytes_per_s` are what the links to the CPU and to other
    cards can carry in one direction, in theory: a machine may wire fewer lanes, and a copy reaches
    less. `peer_link_bytes_per_s` is NVLink to all peers together; None where there is none, so that
    peers talk over the host link, or none is known.

    A field named in `recalled` was not found on any page of `sources`: what follows from it is
    assumed, not read.
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
    pcie: tuple[int, int] | None = None  # generation and lanes
    host_link_bytes_per_s: float | None = None  # one way
    peer_link_bytes_per_s: float | None = None  # one way
    power_w: float | None = None  # the maker's board power; of a laptop, that of the rates above
    pytorch: str = ""  # which PyTorch builds still hold kernels for it, with a way to install them
    aliases: tuple[str, ...] = ()  # people's spellings beyond the id and the name
    sources: tuple[str, ...] = ()  # addresses of the pages the figures were read on
    date: str = ""  # the day they were read, YYYY-MM-DD
    recalled: tuple[str, ...] = ()  # names of the fields above that come from memory

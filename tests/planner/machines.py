"""Machines that stay the same wherever the tests run."""

from __future__ import annotations

from snugpt.planner.machine import Machine
from snugpt.spec.gpu import Gpu
from snugpt.units import GIB


def processor(capacity_bytes: int = 8 * GIB, flops_per_s: float | None = None) -> Machine:
    gpu = Gpu(
        id="cpu",
        name="a processor",
        backend="cpu",
        memory_bytes=capacity_bytes,
        usable_bytes=capacity_bytes,
        bandwidth_bytes_per_s=20e9,
        flops={"fp32": 1.92e11},
    )
    return Machine(
        gpu=gpu,
        capacity_bytes=capacity_bytes,
        num_threads=2,
        measured_flops_per_s=flops_per_s,
    )

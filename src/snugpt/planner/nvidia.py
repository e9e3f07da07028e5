"""The NVIDIA card at hand, as its driver describes it; no CUDA and no torch is started."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from snugpt.errors import BadQuestionError
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.gpu import Dtype, Gpu
from snugpt.spec.runtime import FIRST_BF16

# The driver's device files: its own module, WSL's bridge, and Jetson's.
DRIVER_FILES = tuple(Path("/dev") / name for name in ("nvidiactl", "dxg", "nvhost-ctrl"))
_CARD_FIELDS_ASSUMED = ("bandwidth_bytes_per_s", "flops")


def card_at_hand() -> tuple[Gpu, int] | None:
    """Return the card CUDA would use first, with the bytes free on it; None without a card."""
    if sys.platform == "linux" and not any(file.exists() for file in DRIVER_FILES):
        return None  # spares the import
    index = _first_visible()
    if index is None:
        return None
    try:
        pynvml: Any = import_module("pynvml")
    except ImportError:  # `snugpt[gpu]` brings it
        return None
    try:
        pynvml.nvmlInit()
        try:
            return _card(pynvml, index)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _first_visible() -> int | None:
    """The first index of CUDA_VISIBLE_DEVICES; 0 where it is absent or names cards otherwise."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return 0
    first = listed.split(",")[0].strip()
    if first in ("", "-1"):
        return None
    return int(first) if first.isdigit() else 0


def _card(nvml: Any, index: int) -> tuple[Gpu, int]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(handle)
    name = name.decode() if isinstance(name, bytes) else str(name)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        gpu = find_gpu(name)
    except BadQuestionError:
        gpu = _described(nvml, handle, name, int(memory.total))
    return gpu, min(gpu.usable_bytes, int(memory.free))


def _described(nvml: Any, handle: Any, name: str, total_bytes: int) -> Gpu:
    """A card that is not in the catalogue: sizes from the driver, rates from clocks and cores."""
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    cores = nvml.nvmlDeviceGetNumGpuCores(handle)
    clock_hz = 1e6 * nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
    memory_hz = 1e6 * nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
    bus_bits = nvml.nvmlDeviceGetMemoryBusWidth(handle)
    fp32 = 2.0 * cores * clock_hz  # one fused multiply-add per core and cycle
    flops: dict[Dtype, float] = {"fp32": fp32}
    if (
        major,
        minor,
    ) >= FIRST_BF16:  # GeForce tensor cores: twice fp32; data centre cards have more
        flops |= {"tf32": fp32, "bf16": 2 * fp32}
    return Gpu(
        id="-".join(name.lower().split()),
        name=name,
        backend="cuda",
        memory_bytes=total_bytes,
        usable_bytes=total_bytes,
        bandwidth_bytes_per_s=2 * memory_hz * bus_bits / 8,
        flops=flops,
        capability=(major, minor),
        recalled=_CARD_FIELDS_ASSUMED,
    )

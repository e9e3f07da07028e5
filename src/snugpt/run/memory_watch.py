"""Reading memory counters: CUDA's and the driver's, the process's size, one line for any loop.

All figures in bytes. A counter that is not there is None, never 0.
"""

from __future__ import annotations

import gc
import os
from contextlib import suppress

import msgspec
import torch

from snugpt.run.cpu_allocations import AllocationEvent, CpuAllocations
from snugpt.spec.host import (
    cpu_capacity_bytes,
    peak_resident_bytes,
    reset_peak_resident,
    resident_bytes,
)
from snugpt.units import gib

__all__ = [
    "AllocationEvent",
    "CpuAllocations",
    "CudaCounters",
    "MemoryReport",
    "Peaks",
    "live_cpu_tensor_bytes",
    "memory_report",
    "peak_resident_bytes",
    "reset_peak_resident",
]


class Peaks(msgspec.Struct, frozen=True, kw_only=True):
    """The highest each counter went, in bytes, and in `counters` what counted it."""

    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None
    alloc_retries: int | None = None
    num_ooms: int | None = None
    counters: dict[str, str] = {}


class CudaCounters:
    """PyTorch's and the driver's counters of one card from `reset` to `read`; None without CUDA."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._retries = 0
        self._ooms = 0

    def reset(self) -> None:
        """Start the peaks anew from what is allocated here."""
        if not torch.cuda.is_available():
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        self._retries, self._ooms = self._failures()

    def read(self) -> Peaks:
        """Return the peaks since `reset`. Waits for nothing: the allocator counts on the CPU."""
        if not torch.cuda.is_available():
            return Peaks()
        reserved_bytes = torch.cuda.max_memory_reserved(self._device)
        used_bytes, counted_by = card_use(self._device)
        # The driver has no peak. What the allocator gave back since its own peak was used then.
        given_back_bytes = reserved_bytes - torch.cuda.memory_reserved(self._device)
        retries, ooms = self._failures()
        return Peaks(
            allocated_bytes=torch.cuda.max_memory_allocated(self._device),
            reserved_bytes=reserved_bytes,
            process_bytes=used_bytes + max(0, given_back_bytes),
            alloc_retries=retries - self._retries,
            num_ooms=ooms - self._ooms,
            counters={
                "allocated": "torch.cuda.max_memory_allocated",
                "reserved": "torch.cuda.max_memory_reserved",
                "process": counted_by,
            },
        )

    def _failures(self) -> tuple[int, int]:
        statistics = torch.cuda.memory_stats(self._device)
        return statistics.get("num_alloc_retries", 0), statistics.get("num_ooms", 0)


def card_use(device: torch.device | None = None) -> tuple[int, str]:
    """Return the bytes in use on a CUDA card and who says so: this process's if NVML tells them."""
    with suppress(ImportError):
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            # By its UUID: the driver's numbering is not that of CUDA_VISIBLE_DEVICES.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid() and process.usedGpuMemory:
                    return int(process.usedGpuMemory), "NVML, this process"
    # In a container or under WSL the driver does not know our process number.
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return total_bytes - free_bytes, "torch.cuda.mem_get_info, the whole card"


def live_cpu_tensor_bytes() -> int:
    """Return the bytes of all CPU tensors alive that torch's allocator gave out, storages once.

    What only C++ holds is missed; arrays of other libraries and mapped files are left out.
    """
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor):  # isinstance would ask proxies
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            with suppress(RuntimeError, NotImplementedError):  # sparse, functional: no storage
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    if storage.resizable():
                        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """Memory in use at one moment, in bytes; `str()` is one line. None: nothing counts it here."""

    allocated_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None
    peak_process_bytes: int | None = None
    capacity_bytes: int | None = None

    def __str__(self) -> str:
        parts = (
            _part("allocated", self.allocated_bytes, self.peak_allocated_bytes),
            _part("reserved", self.reserved_bytes),
            _part("process", self.process_bytes, self.peak_process_bytes),
            _part("capacity", self.capacity_bytes),
        )
        return " · ".join(filter(None, parts))


def memory_report(device: torch.device | None = None) -> MemoryReport:
    """Return what is in use now: on the card once CUDA has been touched, else on the CPU.

    On the CPU allocated bytes are known only to a recording (`CpuAllocations`), so they are None.

    Raises:
        FailedError: the system does not say how much memory it has.
    """
    on_cuda = torch.cuda.is_initialized() if device is None else device.type == "cuda"
    if on_cuda:
        return MemoryReport(
            allocated_bytes=torch.cuda.memory_allocated(device),
            peak_allocated_bytes=torch.cuda.max_memory_allocated(device),
            reserved_bytes=torch.cuda.memory_reserved(device),
            process_bytes=card_use(device)[0],
            capacity_bytes=torch.cuda.mem_get_info(device)[1],
        )
    return MemoryReport(
        process_bytes=resident_bytes(),
        peak_process_bytes=peak_resident_bytes(),
        capacity_bytes=cpu_capacity_bytes(),
    )


def _part(name: str, now_bytes: int | None, peak_bytes: int | None = None) -> str:
    if now_bytes is None:
        return "" if peak_bytes is None else f"{name} peak {gib(peak_bytes)}"
    peak = "" if peak_bytes is None else f" (peak {gib(peak_bytes)})"
    return f"{name} {gib(now_bytes)}{peak}"

"""The machine a plan is for: a card of the catalogue, or the one at hand.

Nothing here imports torch: an NVIDIA card is found through its driver's own library (NVML), the
processor through /proc. A rate that was measured here lies in `machine.json` in the cache folder,
`{"cpu": {"flops_per_s": 9.1e10, ...}}`, and is left out of account when the file is damaged.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from snugpt.spec.catalogue import find_gpu
from snugpt.spec.gpu import Gpu
from snugpt.spec.host import cpu_capacity_bytes, default_cache_folder

MACHINE_FILE = "machine.json"
CPU_ID = "cpu"
# What an unknown processor is taken for: two 8-wide fused multiply-adds a cycle per core at 3 GHz,
# and the bandwidth of one memory channel. Assumed, both.
CPU_FLOPS_PER_CYCLE = 32
CPU_CYCLES_PER_S = 3e9
CPU_BYTES_PER_S = 20e9
CPU_FOLDER = Path("/sys/devices/system/cpu")
NO_RATES: Mapping[str, float] = MappingProxyType({})


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan is made for.

    `capacity_bytes` is what a process can have today, before `--reserve`. `measured_flops_per_s` is
    the rate training reached on it, None where nobody measured.
    """

    gpu: Gpu
    capacity_bytes: int
    num_threads: int = 1
    measured_flops_per_s: float | None = None


def share_of_each(machine: Machine, num_processes: int) -> Machine:
    """Return what one of several processes has: a card of its own, or its part of a processor."""
    if num_processes == 1 or machine.gpu.backend != CPU_ID:
        return machine
    measured = machine.measured_flops_per_s
    return msgspec.structs.replace(
        machine,
        capacity_bytes=machine.capacity_bytes // num_processes,
        num_threads=1,  # torchrun says so
        measured_flops_per_s=measured and measured / num_processes,
    )


def machine_for(gpu: str | None) -> Machine:
    """Return the machine a question names: a card of the catalogue, "cpu", or None for this one.

    Raises:
        BadQuestionError: no card has that name.
    """
    if gpu is None:
        return this_machine(measured_rates())
    if gpu.strip().lower() == CPU_ID:
        return this_processor(measured_rates())
    card = find_gpu(gpu)
    return Machine(gpu=card, capacity_bytes=card.usable_bytes)


def this_machine(rates: Mapping[str, float] = NO_RATES) -> Machine:
    """Return the NVIDIA card at hand, or the processor where there is none.

    `rates` are measured FLOP/s by device id.
    """
    from snugpt.planner.nvidia import card_at_hand

    card = card_at_hand()
    if card is None:
        return this_processor(rates)
    gpu, capacity_bytes = card
    return Machine(gpu=gpu, capacity_bytes=capacity_bytes, measured_flops_per_s=rates.get(gpu.id))


def this_processor(rates: Mapping[str, float] = NO_RATES) -> Machine:
    """Return the processor with the memory that is available now; its rates are assumed."""
    num_threads = default_num_threads()
    capacity_bytes = cpu_capacity_bytes()
    gpu = Gpu(
        id=CPU_ID,
        name=_processor_name(),
        backend="cpu",
        memory_bytes=capacity_bytes,
        usable_bytes=capacity_bytes,
        bandwidth_bytes_per_s=CPU_BYTES_PER_S,
        flops={"fp32": num_threads * CPU_FLOPS_PER_CYCLE * CPU_CYCLES_PER_S},
        pytorch="default wheels",
        recalled=("bandwidth_bytes_per_s", "flops"),
    )
    return Machine(
        gpu=gpu,
        capacity_bytes=capacity_bytes,
        num_threads=num_threads,
        measured_flops_per_s=rates.get(CPU_ID),
    )


def measured_rates(folder: Path | None = None) -> dict[str, float]:
    """Read the measured FLOP/s by device id from the cache folder; nothing where it is damaged."""
    path = (default_cache_folder() if folder is None else folder) / MACHINE_FILE
    try:
        records = msgspec.json.decode(path.read_bytes(), type=dict[str, _MeasuredRate])
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        return {}
    rates = {device: record.flops_per_s for device, record in records.items()}
    return {device: rate for device, rate in rates.items() if rate > 0 and math.isfinite(rate)}


class _MeasuredRate(msgspec.Struct, frozen=True):
    flops_per_s: float


def default_num_threads(folder: Path = CPU_FOLDER) -> int:
    """Return the threads torch starts with: OMP_NUM_THREADS, else the cores this process may use.

    Two threads of one core count once, as they do in MKL. `folder` is where sysfs lists processors.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:  # macOS, Windows
        allowed = set(range(os.cpu_count() or 1))
    return max(1, len({_siblings(folder, processor) for processor in allowed}))


def _siblings(folder: Path, processor: int) -> str:
    """The threads of the core that `processor` belongs to; itself where sysfs does not say."""
    try:
        return (folder / f"cpu{processor}/topology/thread_siblings_list").read_text("ascii")
    except (OSError, UnicodeDecodeError):
        return str(processor)


def _processor_name() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine() or "processor"

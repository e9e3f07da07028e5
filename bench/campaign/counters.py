"""What counts memory inside a child: PyTorch's allocator by phase, the driver, kernels, history.

All figures in bytes. On the CPU the allocator is recorded by `CpuAllocations`, so that the campaign
can be rehearsed without a card; what only CUDA has is then absent, never 0.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from snugpt.run.cpu_allocations import CpuAllocations
from snugpt.units import MIB

PEAKS = {
    "requested_bytes": "requested_bytes.all.peak",
    "allocated_bytes": "allocated_bytes.all.peak",
    "active_bytes": "active_bytes.all.peak",
    "reserved_bytes": "reserved_bytes.all.peak",
    "inactive_split_bytes": "inactive_split_bytes.all.peak",
}
TOTALS = ("num_alloc_retries", "num_ooms", "num_device_alloc", "num_device_free")
KERNELS = re.compile(r"attention|flash|fmha|sdp|cudnn|norm", re.IGNORECASE)
HISTORY_ENTRIES = 200_000


class CudaPhases:
    """Peaks of every counter by phase: `mark` ends one phase and starts the peaks anew."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, int]] = {}
        self.marks: list[tuple[int, str]] = []  # time_ns and phase, for the allocator's history
        self._phase: str | None = None

    def mark(self, phase: str | None) -> None:
        """Say that `phase` begins; None ends the last one."""
        found = peaks()
        if self._phase is not None:
            kept = self.phases.setdefault(self._phase, found)
            self.phases[self._phase] = {name: max(kept[name], found[name]) for name in found}
        torch.cuda.reset_peak_memory_stats()
        self._phase = phase
        self.marks.append((time.time_ns(), phase or ""))

    def summary(self) -> dict[str, Any]:
        """Peaks of the whole and of each phase, and how often the allocator had to try again."""
        statistics = torch.cuda.memory_stats()
        whole = {name: max(p[name] for p in self.phases.values()) for name in PEAKS}
        totals = {name: statistics.get(name) for name in TOTALS}
        return {**whole, **totals, "phases": self.phases}


class CpuPhases:
    """The same reading from a recording of the CPU's allocator, which has one counter."""

    def __init__(self, allocations: CpuAllocations) -> None:
        self._allocations = allocations
        self.marks: list[tuple[int, str]] = []

    def mark(self, phase: str | None) -> None:
        """Say that `phase` begins; the last one lasts to the end of the recording."""
        if phase is not None:
            self._allocations.mark(phase)

    def summary(self) -> dict[str, Any]:
        """Read after the recording has ended."""
        phases = {p: {"allocated_bytes": n} for p, n in self._allocations.phases.items()}
        return {"allocated_bytes": max(self._allocations.phases.values()), "phases": phases}


def peaks() -> dict[str, int]:
    """The allocator's peaks since they were last reset."""
    statistics = torch.cuda.memory_stats()
    return {name: int(statistics.get(key, 0)) for name, key in PEAKS.items()}


def driver_use() -> tuple[int | None, str]:
    """Bytes in use on the whole card by the driver's account, without starting CUDA; and by whom.

    None where neither NVML's Python package nor nvidia-smi is there.
    """
    with suppress(ImportError):
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used), "NVML, the whole card"
    program = shutil.which("nvidia-smi")
    if program is not None:
        query = [program, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
        with suppress(OSError, subprocess.SubprocessError, ValueError):
            done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            return int(done.stdout.split()[0]) * MIB, "nvidia-smi, the whole card"
    return None, "nothing: neither pynvml nor nvidia-smi"


def driver_reading(before: int | None) -> dict[str, Any]:
    """What the driver says is in use now, above `before`, beside what PyTorch holds."""
    used, counted_by = driver_use()
    free, total = torch.cuda.mem_get_info()
    above = None if used is None or before is None else used - before
    return {
        "used_bytes": used,
        "above_start_bytes": above,
        "reserved_bytes": torch.cuda.memory_reserved(),
        "outside_pytorch_bytes": None if above is None else above - torch.cuda.memory_reserved(),
        "mem_get_info_used_bytes": total - free,
        "mem_get_info_total_bytes": total,
        "counted_by": counted_by,
    }


def kernels_of(call: Callable[[], object], device: str) -> dict[str, Any]:
    """Names of what attention and norms really ran, and the kernels that took longest in a call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    operators: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    for event in profiler.events():
        on_card = event.device_type == torch.autograd.DeviceType.CUDA
        if on_card:
            kernels[event.name] += 1
            microseconds[event.name] += event.time_range.elapsed_us()
        elif event.name.startswith("aten::"):
            operators[event.name] += 1
    longest = [
        {"name": name[:160], "calls": kernels[name], "us": round(us)}
        for name, us in microseconds.most_common(12)
    ]
    return {
        "operators": {n: c for n, c in sorted(operators.items()) if KERNELS.search(n)},
        "kernels": {n[:160]: c for n, c in sorted(kernels.items()) if KERNELS.search(n)},
        "longest": longest,
    }


def part(missing: dict[str, str], name: str, call: Callable[[], Any]) -> Any:
    """What `call` returns; where it fails, None, and why under its name in `missing`."""
    try:
        return call()
    except Exception as error:  # one part must not cost the record
        missing[name] = f"{type(error).__name__}: {error}"[:300]
        return None


def start_history() -> None:
    """Have PyTorch write down every allocation from here on, with the Python line that asked."""
    torch.cuda.memory._record_memory_history(
        enabled="all", context="all", stacks="python", max_entries=HISTORY_ENTRIES
    )


def write_history(path: Path, marks: list[tuple[int, str]]) -> int:
    """Write the allocator's history and segments so far to a gzip'd JSON file; its bytes."""
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(compact(snapshot, marks), file, separators=(",", ":"))
    return path.stat().st_size


def compact(snapshot: dict[str, Any], marks: list[tuple[int, str]]) -> dict[str, Any]:
    """PyTorch's memory snapshot without stacks: per entry the innermost Python line of ours.

    `device_traces` and `segments` keep PyTorch's own keys, so that a reader of its snapshots reads
    these; `marks` are the beginnings of phases in microseconds of the same clock.
    """

    def entry(found: dict[str, Any]) -> dict[str, Any]:
        kept = {k: found[k] for k in ("action", "addr", "size", "stream", "time_us") if k in found}
        line = _line(found.get("frames") or ())
        return kept | ({"line": line} if line else {})

    def segment(found: dict[str, Any]) -> dict[str, Any]:
        simple = {k: v for k, v in found.items() if isinstance(v, int | str | bool)}
        blocks = [
            {k: v for k, v in block.items() if isinstance(v, int | str)}
            for block in found.get("blocks", ())
        ]
        return simple | {"blocks": blocks}

    return {
        "marks": [{"time_us": time_ns // 1000, "phase": phase} for time_ns, phase in marks],
        "device_traces": [[entry(e) for e in trace] for trace in snapshot["device_traces"]],
        "segments": [segment(s) for s in snapshot["segments"]],
    }


def _line(frames: Any) -> str:
    """The innermost frame that is not PyTorch's, as file:line:function."""
    for frame in frames:
        name = str(frame.get("filename", ""))
        if name.endswith(".py") and "torch" not in Path(name).parts:
            return f"{Path(name).name}:{frame.get('line')}:{frame.get('name')}"
    return ""

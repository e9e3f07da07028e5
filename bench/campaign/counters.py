"""What counts memory inside a child: PyTorch's allocator by phase, the driver, kernels, history.

All figures in bytes. On the CPU the allocator is recorded by `CpuAllocations`, so that the campaign
can be rehearsed without a card; what only CUDA has is then absent, never 0.
"""

from __future__ import annotations

import gzip
import pickle
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice, pairwise
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
    """Write the allocator's history so far as a gzip'd pickle; return the bytes of the file."""
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") as file:
        pickle.dump(compact(snapshot, marks), file)
    return path.stat().st_size


def compact(snapshot: dict[str, Any], marks: list[tuple[int, str]]) -> dict[str, Any]:
    """PyTorch's memory snapshot with call stacks cut to our innermost lines, and with our phases.

    Everything else stays as `torch.cuda.memory._dump_snapshot` writes it, so that whatever reads
    its files reads this one; the phases are ranges among its annotations.
    """
    stacks: dict[int, list[dict[str, Any]]] = {}

    def cut(entry: dict[str, Any]) -> dict[str, Any]:
        frames = entry.get("frames")
        if frames is None:
            return entry
        if id(frames) not in stacks:
            stacks[id(frames)] = our_frames(frames)
        return {**entry, "frames": stacks[id(frames)]}

    segments = [
        {**cut(segment), "blocks": [cut(block) for block in segment["blocks"]]}
        for segment in snapshot["segments"]
    ]
    traces = [[cut(entry) for entry in trace] for trace in snapshot["device_traces"]]
    annotations = [*snapshot.get("external_annotations", ()), *phase_ranges(marks)]
    return {
        **snapshot, "segments": segments, "device_traces": traces,
        "external_annotations": annotations,
    }  # fmt: skip


def our_frames(frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The innermost lines of a call stack that are Python and not PyTorch's own."""
    ours = (
        frame
        for frame in frames
        if str(frame.get("filename", "")).endswith(".py")
        and "torch" not in Path(frame["filename"]).parts
    )
    return [{**frame, "filename": Path(frame["filename"]).name} for frame in islice(ours, 3)]


def phase_ranges(marks: list[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """The phases as PyTorch writes its annotations; each ends just before the next begins."""
    for (begin_ns, phase), (end_ns, _) in pairwise(marks):
        begin_us, end_us = begin_ns // 1000, end_ns // 1000 - 1
        if end_us > begin_us:
            for stage, time_us in (("START", begin_us), ("END", end_us)):
                yield {"name": phase, "stage": stage, "device": 0, "time_us": time_us}

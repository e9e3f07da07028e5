"""The NVIDIA cards at hand and who holds their memory, as the driver's library (NVML) tells.

Neither CUDA nor torch is started. Where nvidia-ml-py is not installed, nvidia-smi is asked.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from snugpt.planner.doctor.reading import plain
from snugpt.planner.nvidia import DRIVER_FILES
from snugpt.units import MIB

SMI_TIMEOUT_S = 10.0
_SMI_CARD = (
    "index,name,memory.total,memory.free,memory.used,compute_cap,display_active,driver_version"
)
_SMI_PROCESS = "pid,process_name,used_memory"


class CardProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process on a card. `bytes` is None where the driver does not count by process (Windows)."""

    pid: int
    name: str
    bytes: int | None = None
    draws: bool = False  # a display's, not a computation's


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A card as it is now. `kept_bytes` is what the driver keeps of it for itself."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    kept_bytes: int | None = None
    capability: tuple[int, int] | None = None
    display: bool | None = None
    processes: tuple[CardProcess, ...] = ()


class Driver(msgspec.Struct, frozen=True, kw_only=True):
    """The driver with its cards. `cuda` is the newest CUDA it runs. `told_by` is who said it."""

    version: str
    cuda: tuple[int, int] | None
    cards: tuple[Card, ...]
    told_by: str


def driver_at_hand() -> Driver | None:
    """Return the NVIDIA driver and its cards; None where there is none or it does not answer."""
    if sys.platform == "linux" and not any(file.exists() for file in DRIVER_FILES):
        return None  # spares the import
    with suppress(ImportError):
        nvml: Any = import_module("pynvml")
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            return None
        try:
            return _by_nvml(nvml)
        except nvml.NVMLError:
            return None
        finally:
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()
    return _by_smi()


def _by_nvml(nvml: Any) -> Driver:
    cards = [_card(nvml, index) for index in range(int(nvml.nvmlDeviceGetCount()))]
    cuda = _or_none(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    return Driver(
        version=_text(nvml.nvmlSystemGetDriverVersion()),
        cuda=None if cuda is None else (int(cuda) // 1000, int(cuda) % 1000 // 10),
        cards=tuple(cards),
        told_by="NVML",
    )


def _card(nvml: Any, index: int) -> Card:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    kept = _or_none(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2).reserved)
    capability = _or_none(nvml, lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle))
    active = _or_none(nvml, lambda: nvml.nvmlDeviceGetDisplayActive(handle))
    return Card(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        kept_bytes=None if kept is None else int(kept),
        capability=None if capability is None else (int(capability[0]), int(capability[1])),
        display=None if active is None else bool(active),
        processes=tuple(_processes(nvml, handle)),
    )


def _processes(nvml: Any, handle: Any) -> list[CardProcess]:
    """Who is on the card; a process that computes and draws is listed once."""
    found: dict[int, CardProcess] = {}
    for call, draws in (
        (nvml.nvmlDeviceGetComputeRunningProcesses, False),
        (nvml.nvmlDeviceGetGraphicsRunningProcesses, True),
    ):
        for each in _or_none(nvml, partial(call, handle)) or ():
            size = each.usedGpuMemory
            found.setdefault(
                int(each.pid),
                CardProcess(
                    pid=int(each.pid),
                    name=process_name(nvml, int(each.pid)),
                    bytes=None if size is None else int(size),
                    draws=draws,
                ),
            )
    return sorted(found.values(), key=lambda process: -(process.bytes or 0))


def process_name(nvml: Any, pid: int) -> str:
    """The name of a process's program: NVML's, else the kernel's, else nothing."""
    name = _or_none(nvml, lambda: nvml.nvmlSystemGetProcessName(pid))
    if not name:
        try:
            name = (Path("/proc") / str(pid) / "comm").read_text("utf-8", "replace")
        except OSError:
            name = ""
    words = _text(name).split()
    return words[0].replace("\\", "/").rpartition("/")[2][:40] if words else ""


def _or_none(nvml: Any, call: Callable[[], Any]) -> Any:
    """What a call says; None where this driver or card does not know it."""
    try:
        return call()
    except (nvml.NVMLError, AttributeError, TypeError):
        return None


def _text(value: bytes | str) -> str:
    return plain(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))


def _by_smi() -> Driver | None:
    rows = _smi(f"--query-gpu={_SMI_CARD}")
    if not rows:
        return None
    # nvidia-smi lists processes without their card's number; with one card that is no question.
    processes = _smi(f"--query-compute-apps={_SMI_PROCESS}") if len(rows) == 1 else []
    cards = []
    for cells in rows:
        if len(cells) != len(_SMI_CARD.split(",")):
            return None
        index, name, total, free, _, capability, display, _ = cells
        major, _, minor = capability.partition(".")
        cards.append(
            Card(
                index=_whole(index) or 0,
                name=name,
                total_bytes=(_whole(total) or 0) * MIB,
                free_bytes=(_whole(free) or 0) * MIB,
                capability=(int(major), int(minor)) if (major + minor).isdecimal() else None,
                display=display.lower() == "enabled",
                processes=tuple(_smi_process(cells) for cells in processes if len(cells) == 3),
            )
        )
    return Driver(version=rows[0][-1], cuda=None, cards=tuple(cards), told_by="nvidia-smi")


def _smi_process(cells: Sequence[str]) -> CardProcess:
    size = _whole(cells[2])
    name = cells[1].replace("\\", "/").rpartition("/")[2]
    return CardProcess(
        pid=_whole(cells[0]) or 0, name=name, bytes=None if size is None else size * MIB
    )


def _smi(query: str) -> list[list[str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True, timeout=SMI_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    if done.returncode:
        return []
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return [[plain(cell.strip()) for cell in line.split(",")] for line in lines if line.strip()]


def _whole(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 16 else None

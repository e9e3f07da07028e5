"""The machine at hand: threads as torch counts them, a measured rate, a card by its driver."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from snugpt.planner import nvidia
from snugpt.planner.machine import (
    default_num_threads,
    machine_for,
    measured_rates,
    this_machine,
    this_processor,
)
from snugpt.units import GIB, MIB


def _siblings(folder: Path, groups: list[str]) -> Path:
    for processor, group in enumerate(groups):
        topology = folder / f"cpu{processor}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(group + "\n")
    return folder


def test_two_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    folder = _siblings(tmp_path, ["0,2", "1,3", "0,2", "1,3"])
    assert default_num_threads(folder) == 2
    assert default_num_threads(tmp_path / "nothing") == 4
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2}, raising=False)
    assert default_num_threads(folder) == 1


def test_omp_num_threads_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert default_num_threads() >= 1


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ('{"cpu": {"flops_per_s": 9e10, "measured": "2026-11-20", "torch": "2"}}', {"cpu": 9e10}),
        ('{"cpu": {"flops_per_s": -1}}', {}),
        ('{"cpu": {"flops_per_s": "fast"}}', {}),
        ('{"cpu": ', {}),
        ("[]", {}),
        (None, {}),
    ],
)
def test_a_damaged_rate_is_left_out(
    text: str | None, rates: dict[str, float], tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "machine.json").write_text(text)
    assert measured_rates(tmp_path) == rates


def test_the_processor_has_a_name_a_rate_and_room() -> None:
    machine = this_processor({"cpu": 5e9})
    assert machine.gpu.backend == "cpu"
    assert machine.measured_flops_per_s == 5e9
    assert machine.capacity_bytes > 100 * MIB
    assert set(machine.gpu.recalled) == {"bandwidth_bytes_per_s", "flops"}
    assert machine_for("CPU").gpu.id == "cpu"


class _Driver:
    """Stands for NVML with one card in the machine."""

    NVMLError = RuntimeError
    NVML_CLOCK_SM = NVML_CLOCK_MEM = 0

    def __init__(self, name: str, capability: tuple[int, int] = (9, 9)) -> None:
        self.name, self.capability = name, capability

    def nvmlInit(self) -> None: ...  # noqa: N802
    def nvmlShutdown(self) -> None: ...  # noqa: N802

    def __getattr__(self, call: str):
        answers = {
            "nvmlDeviceGetHandleByIndex": 0,
            "nvmlDeviceGetName": self.name,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24 * GIB, free=20 * GIB),
            "nvmlDeviceGetCudaComputeCapability": self.capability,
            "nvmlDeviceGetNumGpuCores": 1000,
            "nvmlDeviceGetMaxClockInfo": 2000,
            "nvmlDeviceGetMemoryBusWidth": 256,
        }
        return lambda *_: answers[call]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvidia, "DRIVER_FILES", (tmp_path,))

    def install(*arguments: object) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", _Driver(*arguments))

    return install


def test_the_drivers_name_finds_the_card_and_what_is_free_is_its_capacity(driver) -> None:
    driver("NVIDIA GeForce RTX 4090")
    machine = this_machine()
    assert machine.gpu.id == "rtx-4090"
    assert machine.capacity_bytes == 20 * GIB


def test_a_card_that_is_not_in_the_catalogue_is_described_by_its_driver(driver) -> None:
    driver("NVIDIA Future 9000")
    gpu = this_machine().gpu
    assert (gpu.name, gpu.memory_bytes, gpu.capability) == ("NVIDIA Future 9000", 24 * GIB, (9, 9))
    assert gpu.flops["fp32"] == 2 * 1000 * 2e9
    assert gpu.bandwidth_bytes_per_s == 2 * 2e9 * 32
    assert "flops" in gpu.recalled


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_card_hidden_from_cuda_is_not_planned_for(
    hidden: str, driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver("NVIDIA GeForce RTX 4090")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert this_machine().gpu.id == "cpu"


def test_a_driver_that_fails_means_the_processor(driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver("NVIDIA GeForce RTX 4090")

    def fails(self: _Driver) -> None:
        raise RuntimeError("driver not loaded")

    monkeypatch.setattr(_Driver, "nvmlInit", fails)
    assert this_machine().gpu.id == "cpu"

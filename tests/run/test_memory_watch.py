"""Allocator events against tensors whose sizes are known by hand, and what Watch leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks

from snugpt.errors import BadQuestionError, FailedError
from snugpt.ledger.store import read_all
from snugpt.run.environment import this_environment
from snugpt.run.memory_watch import (
    CpuAllocations,
    CudaCounters,
    MemoryReport,
    Peaks,
    live_cpu_tensor_bytes,
    memory_report,
)
from snugpt.run.watch import Watch, is_out_of_memory
from snugpt.spec.measurement import Measurement

CPU = torch.device("cpu")
MIB = 2**20


def _floats(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes // 4)


def _train_once(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(4, 16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _watched(folder: Path) -> Measurement:
    (measurement,) = read_all(folder)
    return measurement


def test_peak_and_rest_of_tensors_of_known_size() -> None:
    with CpuAllocations(base_bytes=7) as allocations:
        kept = _floats(4000)
        first = _floats(1000)
        del first
        second = _floats(600)
        del second
    assert [event.bytes for event in allocations.events] == [4000, 1000, -1000, 600, -600]
    assert (allocations.peak_bytes, allocations.live_bytes) == (5007, 4007)
    assert allocations.num_events == 5
    assert kept.numel() == 1000


def test_a_phase_peak_holds_what_came_from_before_it() -> None:
    with CpuAllocations() as allocations:
        kept = _floats(4000)
        allocations.mark("forward")
        _floats(1000)
        allocations.mark("loss")
        allocations.mark("backward")
        del kept
        _floats(2000)
        allocations.mark("forward")
        _floats(8000)
        allocations.mark("optimizer")
    # "forward" is there twice: 5000, then 8000.
    assert allocations.phases == {"forward": 8000, "loss": 4000, "backward": 4000, "optimizer": 0}


def test_a_step_of_a_small_mlp_by_hand() -> None:
    batch, width, hidden = 32, 16, 64
    x = torch.ones(batch, width)
    with CpuAllocations() as allocations:
        model = torch.nn.Sequential(
            torch.nn.Linear(width, hidden, bias=False),
            torch.nn.ReLU(),
            torch.nn.Linear(hidden, width, bias=False),
        )
        weights_bytes = 4 * (width * hidden + hidden * width)
        assert sum(4 * weight.numel() for weight in model.parameters()) == weights_bytes
        allocations.mark("forward")
        y = model(x)
        allocations.mark("backward")
        y.backward(torch.ones(batch, width))
        del y
    h_bytes, y_bytes = 4 * batch * hidden, 4 * batch * width
    # ReLU keeps its output, the first Linear's output is gone when its turn is over.
    assert allocations.phases["forward"] == weights_bytes + 2 * h_bytes + max(0, y_bytes - h_bytes)
    assert allocations.live_bytes == 2 * weights_bytes  # weights and their gradients


def test_event_times_are_those_of_the_clock() -> None:
    bounds = []
    with CpuAllocations() as allocations:
        for _ in range(20):
            before = time.time_ns()
            block = _floats(4000)
            bounds.append((before, time.time_ns()))
            del block
    taken = [event.time_ns for event in allocations.events if event.bytes > 0]
    for (before, after), moment in zip(bounds, taken, strict=True):
        assert before <= moment <= after


def test_draining_changes_no_figure() -> None:
    with CpuAllocations() as allocations:
        allocations.mark("forward")
        kept = _floats(4000)
        allocations.drain()
        _floats(1000)
        allocations.drain()
        allocations.drain()
        del kept
    assert [event.bytes for event in allocations.events] == [4000, 1000, -1000, -4000]
    assert allocations.phases == {"forward": 5000}
    assert allocations.live_bytes == 0


def test_a_mark_counts_once() -> None:
    with CpuAllocations() as allocations:
        allocations.mark("forward")
        allocations.mark("loss")
        allocations.drain()
        kept = _floats(4000)
        allocations.drain()
    assert allocations.phases == {"forward": 0, "loss": 4000}
    assert kept.numel() == 1000


def test_blocks_of_an_earlier_recording_are_not_given_back_in_this_one() -> None:
    with CpuAllocations():
        old = _floats(4000)
    with CpuAllocations() as allocations:
        del old
        new = _floats(600)
    assert [event.bytes for event in allocations.events] == [600]
    assert new.numel() == 150


def test_two_recordings_at_once_are_refused() -> None:
    with (
        CpuAllocations() as outer,
        pytest.raises(FailedError, match="already recording"),
        CpuAllocations(),
    ):
        pass
    assert not outer.interrupted


def test_another_profiler_inside_is_noticed_and_left_alone() -> None:
    with CpuAllocations() as allocations:
        profile = torch.autograd.profiler.profile(profile_memory=True)
        with profile:
            _floats(4000)
            allocations.drain()
            _floats(600)
    assert allocations.interrupted
    events = profile.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert {4000, 600} <= set(sizes)


def test_nothing_is_written_on_the_terminal() -> None:
    """In a fresh process: kineto reads its log level once, and c10 writes past Python."""
    program = """
import torch
from snugpt.run.memory_watch import CpuAllocations
old = torch.empty(1000)
for _ in range(2):
    with CpuAllocations() as allocations:
        del old
        old = torch.empty(10)
assert allocations.peak_bytes == 40
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("KINETO_LOG_LEVEL",)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    assert "KINETO_LOG_LEVEL" not in os.environ


def test_live_tensors_are_counted_once_and_foreign_memory_is_not() -> None:
    before = live_cpu_tensor_bytes()
    kept = torch.nn.Parameter(_floats(4000))
    views = (kept.detach()[10:], kept.detach().reshape(10, 100))
    kept.sum().backward()  # a gradient that only C++ has seen so far
    foreign = torch.frombuffer(bytearray(10**6), dtype=torch.uint8)
    assert live_cpu_tensor_bytes() - before == 8000
    assert len(views) == 2
    assert foreign.numel() == 10**6


PEAKS = """
from snugpt.spec.host import peak_resident_bytes, reset_peak_resident
assert reset_peak_resident()
low = peak_resident_bytes()
bytearray(b"x") * (64 * 2**20)
high = peak_resident_bytes()
assert reset_peak_resident()
print(high - low, high - peak_resident_bytes())
"""


def test_peak_resident_size_starts_anew() -> None:
    # In a process of its own: this one holds freed memory that would be used again unseen.
    rise, fall = subprocess.check_output([sys.executable, "-c", PEAKS], text=True).split()
    assert int(rise) > 60 * MIB
    assert int(fall) > 50 * MIB


def test_without_cuda_its_counters_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    counters = CudaCounters()
    counters.reset()
    assert counters.read() == Peaks()


def test_a_report_is_one_line_and_says_which_counter() -> None:
    report = MemoryReport(
        allocated_bytes=1300 * MIB,
        peak_allocated_bytes=1464 * MIB,
        reserved_bytes=1536 * MIB,
        process_bytes=1966 * MIB,
        capacity_bytes=24166 * MIB,
    )
    assert str(report) == (
        "allocated 1.27 GiB (peak 1.43 GiB) · reserved 1.50 GiB · process 1.92 GiB"
        " · capacity 23.6 GiB"
    )
    here = memory_report(CPU)
    assert here.allocated_bytes is None
    assert str(here).startswith("process ")
    assert here.process_bytes is not None
    assert here.capacity_bytes is not None
    assert 0 < here.process_bytes < here.capacity_bytes


def test_watch_leaves_a_measurement(tmp_path: Path) -> None:
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    held = _floats(10**6)
    base_bytes = live_cpu_tensor_bytes()
    with Watch(folder=tmp_path, device="cpu") as watch:
        for _ in range(3):
            watch.mark("forward")
            block = _floats(10**6)
            _train_once(model, optimizer)
            del block
            watch.step(tokens=4)
    assert not _global_optimizer_post_hooks
    measurement = _watched(tmp_path)
    assert held.numel() == 250_000
    assert watch.measurement == measurement
    assert (measurement.outcome, measurement.steps) == ("fit", 3)
    assert measurement.program == "snugpt.Watch"
    assert measurement.allocated_bytes is not None
    assert base_bytes + 10**6 < measurement.allocated_bytes < base_bytes + 10**6 + 50_000
    assert measurement.reserved_bytes == measurement.allocated_bytes
    assert measurement.phases == {"forward": measurement.allocated_bytes}
    assert measurement.process_bytes is not None
    assert measurement.tokens_per_s is not None
    assert measurement.counters == {
        "allocated": "torch CPU allocator events",
        "reserved": "torch CPU allocator events",
        "process": "peak resident size",
    }
    assert measurement.environment.torch == torch.__version__


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (ValueError("out of memory"), "failed"),
        (KeyboardInterrupt(), "failed"),
    ],
)
def test_an_exception_passes_through_and_is_recorded(
    tmp_path: Path, error: BaseException, outcome: str
) -> None:
    with pytest.raises(type(error)) as caught, Watch(folder=tmp_path, device="cpu"):
        raise error
    assert caught.value is error
    assert _watched(tmp_path).outcome == outcome
    assert not torch.autograd._profiler_enabled()


def test_a_full_ram_is_out_of_memory(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="allocate memory") as caught,
        Watch(folder=tmp_path, device="cpu"),
    ):
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    assert _watched(tmp_path).outcome == "oom"


def test_a_recording_ends_after_so_many_events_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snugpt.run.watch._FIRST_SEGMENT_S", 0.0)
    monkeypatch.setattr("snugpt.run.watch._SEGMENT_EVENTS", 0)
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.SGD(model.parameters())
    with Watch(folder=tmp_path, device="cpu", max_events=5) as watch:
        _train_once(model, optimizer)
        assert not torch.autograd._profiler_enabled()
        late = _floats(10**7)
        watch.step()
    measurement = _watched(tmp_path)
    assert "the first" in measurement.counters["allocated"]
    assert measurement.allocated_bytes is not None
    assert measurement.allocated_bytes < live_cpu_tensor_bytes()
    assert late.numel() == 10**7 // 4


def test_a_profile_of_the_user_is_not_disturbed(tmp_path: Path) -> None:
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        with Watch(folder=tmp_path / "inside", device="cpu"):
            _floats(4000)
        after = _floats(600)
    sizes = [e.nbytes() for e in profile.kineto_results.events() if e.name() == "[memory]"]
    assert {4000, 600} <= set(sizes)
    assert "already recording" in _watched(tmp_path / "inside").counters["allocated"]
    assert _watched(tmp_path / "inside").allocated_bytes is None
    assert after.numel() == 150


def test_without_allocations_only_the_process_is_counted(tmp_path: Path) -> None:
    with Watch(folder=tmp_path, device="cpu", allocations=False):
        assert not torch.autograd._profiler_enabled()
    measurement = _watched(tmp_path)
    assert measurement.allocated_bytes is None
    assert set(measurement.counters) == {"process"}


def test_a_ledger_that_can_not_be_written_costs_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with Watch(folder=tmp_path / "file", device="cpu") as watch:
        pass
    assert watch.measurement is not None
    assert capsys.readouterr().err.count("\n") == 1


def test_watching_nothing_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadQuestionError, match="max_events"):
        Watch(folder=tmp_path, max_events=0)


def test_the_environment_names_the_processor_and_the_versions() -> None:
    environment = this_environment(CPU)
    assert environment.torch == torch.__version__
    assert environment.num_threads == torch.get_num_threads()
    assert environment.device
    assert environment.cuda is None

"""Watch: measure any training loop, keep the receipt in the ledger.

with snugpt.Watch() as watch:
    for batch in batches:
        ...
        watch.step(tokens=batch.numel())   # optional: steps and tokens per second
watch.measurement
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from snugpt.errors import FailedError, bad_value
from snugpt.ledger.store import append
from snugpt.run.measuring import measurement_of
from snugpt.run.memory_watch import (
    CpuAllocations,
    CudaCounters,
    Peaks,
    live_cpu_tensor_bytes,
    peak_resident_bytes,
    reset_peak_resident,
)
from snugpt.spec.host import default_ledger_folder
from snugpt.spec.measurement import Measurement, Outcome
from snugpt.spec.memory import MemoryEstimate, Phase
from snugpt.spec.recipe import Recipe
from snugpt.spec.shape import ModelShape

MAX_EVENTS = 300_000  # reading them takes 1 to 3 s in all
_SEGMENT_EVENTS = 5_000  # unread events kept at a time, about 10 MB
_FIRST_SEGMENT_S = 0.05

_OUT_OF_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` says that the card or the RAM is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


class Watch:
    """Count memory from `with` to the end of the block and append a Measurement to the ledger.

    `folder` is the ledger's (default: `default_ledger_folder()`), `device` the one that trains
    (default: CUDA if there is one). `predicted`, `shape` and `recipe` go into the measurement as
    they are. On the CPU torch's allocator is recorded in this thread for the first `max_events`
    events, unless `allocations=False`; tensors alive at the start count as held throughout. The
    events are read after optimizer steps: a long loop without an optimizer calls `step` instead,
    or the recording grows by about 50 bytes an event.

    An exception passes through after it was recorded: outcome "oom" or "failed". A ledger that
    can't be written costs one line on stderr, not the run. After the block: `measurement`.
    """

    def __init__(
        self,
        program: str = "snugpt.Watch",
        *,
        folder: Path | str | None = None,
        shape: ModelShape | None = None,
        recipe: Recipe | None = None,
        predicted: MemoryEstimate | None = None,
        device: torch.device | str | None = None,
        allocations: bool = True,
        max_events: int = MAX_EVENTS,
    ) -> None:
        if max_events < 1:
            raise bad_value("max_events", max_events, "at least 1")
        self.measurement: Measurement | None = None
        self._program = program
        self._folder = default_ledger_folder() if folder is None else Path(folder)
        self._question = {"shape": shape, "recipe": recipe, "predicted": predicted}
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._device = torch.device(kind)
        self._cuda = CudaCounters(self._device) if self._device.type == "cuda" else None
        self._cpu = _BoundedAllocations(max_events) if allocations and not self._cuda else None
        self._resident_was_reset = False
        self._steps = 0
        self._tokens = 0
        self._first_step_s = self._last_step_s = 0.0

    def __enter__(self) -> Watch:
        if self._cuda:
            self._cuda.reset()
        else:
            self._resident_was_reset = reset_peak_resident()
        if self._cpu:
            self._cpu.start()
        self._start_s = time.perf_counter()
        return self

    def step(self, tokens: int = 0) -> None:
        """Say that one optimizer step over `tokens` tokens has ended."""
        self._last_step_s = time.perf_counter()
        if self._steps == 0:
            self._first_step_s = self._last_step_s
            self._first_tokens = tokens
        self._steps += 1
        self._tokens += tokens
        if self._cpu:
            self._cpu.keep_small()

    def mark(self, phase: Phase) -> None:
        """Say that `phase` begins here; on the CPU the measurement then has its peak."""
        if self._cpu:
            self._cpu.mark(phase)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        outcome: Outcome = "fit"
        if kind is not None:
            outcome = "oom" if is_out_of_memory(error) else "failed"
        self.measurement = self._measure(outcome)
        try:
            append(self._folder, self.measurement)
        except FailedError as failure:
            sys.stderr.write(f"warning: measurement not kept: {failure.message}\n")

    def _measure(self, outcome: Outcome) -> Measurement:
        peaks = self._cuda.read() if self._cuda else self._cpu_peaks()
        return measurement_of(
            self._device,
            peaks,
            self._cpu.phases if self._cpu else None,
            program=self._program,
            outcome=outcome,
            argv=sys.argv,
            **self._question,
            tokens_per_s=self._tokens_per_s(),
            steps=self._steps or None,
        )

    def _cpu_peaks(self) -> Peaks:
        process_bytes = peak_resident_bytes()  # before the last events are read, which takes memory
        since = "" if self._resident_was_reset else ", since the process began"
        counters = {"process": f"peak resident size{since}"} if process_bytes is not None else {}
        if self._cpu is None:
            return Peaks(process_bytes=process_bytes, counters=counters)
        allocated_bytes, counted_by = self._cpu.stop()
        return Peaks(
            allocated_bytes=allocated_bytes,
            reserved_bytes=allocated_bytes,  # the CPU allocator holds nothing back
            process_bytes=process_bytes,
            counters=counters | {"allocated": counted_by, "reserved": counted_by},
        )

    def _tokens_per_s(self) -> float | None:
        """From the end of the first step on, which also pays for warming up."""
        if self._tokens == 0:
            return None
        if self._steps == 1:
            return self._tokens / (self._last_step_s - self._start_s)
        return (self._tokens - self._first_tokens) / (self._last_step_s - self._first_step_s)


class _BoundedAllocations:
    """A recording that is read every few thousand events, and ends after `max_events`.

    The number of events not yet read is unknown, so their rate so far says when to read next. The
    occasion is the end of an optimizer's step: there the recording can be stopped and started
    again, which inside a backward pass it can't (autograd puts its own thread state back).
    """

    def __init__(self, max_events: int) -> None:
        self._max_events = max_events
        self._allocations: CpuAllocations | None = None
        self._running = False
        self._note = "torch's profiler was already recording: not counted"
        self._counted: int | None = None
        self.phases: dict[Phase, int] | None = None

    def start(self) -> None:
        base_bytes = live_cpu_tensor_bytes()
        allocations = CpuAllocations(base_bytes, keep_events=False)
        try:
            allocations.__enter__()
        except FailedError:  # somebody else's profile is worth more than our count
            return
        self._allocations = allocations
        self._running = True
        self._thread = threading.get_ident()
        self._start_s = self._read_s = time.perf_counter()
        self._segment_s = _FIRST_SEGMENT_S
        self._hook = register_optimizer_step_post_hook(self._after_optimizer)

    def mark(self, phase: Phase) -> None:
        if self._allocations and self._running:
            self._allocations.mark(phase)

    def keep_small(self) -> None:
        """Read what was recorded if it may have grown; end the recording when it is long enough."""
        if not self._allocations or not self._running:
            return
        elapsed_s = time.perf_counter() - self._read_s
        if elapsed_s < self._segment_s or threading.get_ident() != self._thread:
            return
        before = self._allocations.num_events
        self._allocations.drain()
        events_per_s = (self._allocations.num_events - before) / elapsed_s
        self._segment_s = min(1.0, _SEGMENT_EVENTS / max(events_per_s, 1.0))
        self._read_s = time.perf_counter()
        if self._allocations.num_events >= self._max_events:
            self._end(f", the first {self._read_s - self._start_s:.3g} s")

    def stop(self) -> tuple[int | None, str]:
        """End the recording; return the peak with what was alive before, and what counted it."""
        if self._running:
            self._end("")
        return self._counted, self._note

    def _after_optimizer(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.keep_small()

    def _end(self, how_long: str) -> None:
        assert self._allocations is not None
        self._running = False
        self._hook.remove()
        self._allocations.__exit__(None, None, None)
        if self._allocations.interrupted:
            self._note = "another torch profiler ran inside: not counted"
            return
        self._note = f"torch CPU allocator events{how_long}"
        self._counted = self._allocations.peak_bytes
        self.phases = self._allocations.phases or None

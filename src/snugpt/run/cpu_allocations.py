"""The CPU's memory events: what torch's own allocator gave out and took back, in order.

Counted is what this thread asks of torch's allocator; what libraries take for themselves (oneDNN,
MKL) and what other threads allocate shows in the process's size only.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import profiler

from snugpt.errors import FailedError
from snugpt.spec.memory import Phase

_NOTHING_BELOW_FATAL = "6"  # kineto announces every start and stop one level under this
_ERRORS_ONLY = 2  # c10's log levels: info 0, warning 1, error 2


class AllocationEvent(NamedTuple):
    """One block taken (bytes above 0) or given back (below 0) at a time of `time.time_ns`."""

    time_ns: int
    bytes: int


class CpuAllocations:
    """Record torch's CPU allocator in this thread, from `with` to the end of the block.

        with CpuAllocations() as allocations:
            model = build()
            step(..., mark=allocations.mark)
        allocations.peak_bytes, allocations.phases

    Start before the model is built, or say in `base_bytes` what was alive: blocks older than the
    recording are not seen, neither held nor given back. Operators are not recorded, so the block
    runs at its own speed; reading the events takes some microseconds each, at the end or in
    `drain`. With `keep_events=False` only the totals stay.

    After the block: `events` in order, `num_events`, `live_bytes` (at the end), `peak_bytes`,
    `phases` (the peak within each marked phase, blocks held from before included); the bytes all
    include `base_bytes`. `interrupted`: another torch profiler ran inside and took the rest.

    Raises:
        FailedError: on entry, when torch's profiler already records in this thread.
    """

    def __init__(self, base_bytes: int = 0, *, keep_events: bool = True) -> None:
        self.events: list[AllocationEvent] = []
        self.num_events = 0
        self.live_bytes = base_bytes
        self.peak_bytes = base_bytes
        self.phases: dict[Phase, int] = {}
        self.interrupted = False
        self._keep_events = keep_events
        self._blocks: dict[int, int] = {}  # address -> bytes
        self._marks: list[tuple[int, Phase]] = []
        self._phase: Phase | None = None

    def __enter__(self) -> CpuAllocations:
        if torch.autograd._profiler_enabled():
            raise FailedError(
                "torch's profiler is already recording in this thread",
                hint="snugpt.Watch(allocations=False)",
            )
        self._log_level = _set_log_level(_ERRORS_ONLY)
        _start_recording()
        return self

    def __exit__(self, *_: object) -> None:
        self._read()
        _set_log_level(self._log_level)

    def mark(self, phase: Phase) -> None:
        """Say that `phase` begins here; it lasts until the next mark."""
        self._marks.append((time.time_ns(), phase))

    def drain(self) -> None:
        """Read what was recorded so far and go on: keeps a long recording from growing."""
        if self._read():
            _start_recording()

    def _read(self) -> bool:
        """Stop and take the events in; False when the recording is no longer ours."""
        # torch's own profilers replace a running one without a word and set this flag of theirs.
        if self.interrupted or profiler._is_profiler_enabled or not _recording():
            self.interrupted = True
            return False
        tree = torch.autograd._disable_profiler().experimental_event_tree()
        kind = torch._C._profiler._ExtraFields_Allocation  # not the ones that could not be had
        found = [(event.start_time_ns, event.extra_fields) for event in tree]
        found = [each for each in found if isinstance(each[1], kind)]
        found.sort(key=lambda each: each[0])  # stable: equal times stay in the order recorded
        marks = iter(self._marks)
        mark = next(marks, None)
        for time_ns, block in found:
            while mark is not None and mark[0] <= time_ns:
                self._begin(mark[1])
                mark = next(marks, None)
            if block.device.type == "cpu":
                self._take(time_ns, block.ptr, block.alloc_size)
        for _, phase in [mark, *marks] if mark is not None else []:
            self._begin(phase)
        self._marks.clear()
        return True

    def _begin(self, phase: Phase) -> None:
        self._phase = phase
        self._raise_peaks()

    def _take(self, time_ns: int, address: int, num_bytes: int) -> None:
        # The allocator reports a block older than the recording with the size that its address had
        # in an earlier one, if at all. And another thread may have given a block back unseen.
        held = self._blocks.pop(address, 0)
        if num_bytes > 0:
            self._blocks[address] = num_bytes
            if held:
                self._change(time_ns, -held)
            self._change(time_ns, num_bytes)
        elif held:
            self._change(time_ns, -held)

    def _change(self, time_ns: int, num_bytes: int) -> None:
        self.num_events += 1
        self.live_bytes += num_bytes
        self._raise_peaks()
        if self._keep_events:
            self.events.append(AllocationEvent(time_ns, num_bytes))

    def _raise_peaks(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self._phase is not None:
            self.phases[self._phase] = max(self.phases.get(self._phase, 0), self.live_bytes)


def _recording() -> bool:
    return bool(torch.autograd._profiler_enabled())


def _start_recording() -> None:
    # What torch.profiler.profile(profile_memory=True) does, for no operator: recording those makes
    # small models 2 to 10 times slower and the reading 30 times. No operator has this scope.
    settings = profiler.profile(profile_memory=True)
    config = settings.config(create_trace_id=True)
    with _quiet_kineto():
        torch.autograd._prepare_profiler(config, settings.kineto_activities)
    scopes = {torch._C._profiler.RecordScope.LITE_INTERPRETER}
    torch.autograd._enable_profiler(config, settings.kineto_activities, scopes)


@contextmanager
def _quiet_kineto() -> Iterator[None]:
    """Keep kineto's start and stop lines off the terminal: it reads its log level once, here."""
    if "KINETO_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["KINETO_LOG_LEVEL"] = _NOTHING_BELOW_FATAL
    try:
        yield
    finally:
        os.environ.pop("KINETO_LOG_LEVEL", None)


def _set_log_level(level: int | None) -> int | None:
    """Set the level of torch's C++ log and return the one before; None where it can't be reached.

    While memory is recorded the allocator warns of every block older than the recording. The level
    is read from TORCH_CPP_LOG_LEVEL when torch is imported and has no Python name afterwards.
    """
    if level is None:
        return None
    with suppress(OSError, ValueError):
        library = next((Path(torch.__file__).parent / "lib").glob("*c10.*"), Path("c10"))
        flag = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
        before, flag.value = flag.value, level
        return before
    return None

"""What a trace of a model says: peaks by every counter, phases, tensors, the largest batch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from snugpt.errors import SnugError
from snugpt.estimate.process import highest_process_bytes, process_band, reserved_band
from snugpt.estimate.timeline import Timeline
from snugpt.planner.machine import Machine
from snugpt.spec.gpu import Gpu
from snugpt.spec.memory import BytesBand, Category, Phase
from snugpt.spec.runtime import Runtime
from snugpt.tracing.batch_line import holds_at, line_through
from snugpt.units import gib

SHOWN_TENSORS = 30
LARGEST_BATCH = 2**30
LINE_BATCHES, CHECK_BATCH = (2, 3), 5
LAYER = re.compile(r"(?<=\.)\d+(?=[.:]|$)|^\d+(?=[.:])")


@dataclass(frozen=True, slots=True)
class Recorded:
    """One traced step: its timeline, the attention kernels by name, what has to be said."""

    timeline: Timeline
    attention: dict[str, int]
    notes: tuple[str, ...]


class TracedTensor(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors alive at the peak that differ at most in their layer; `bytes` are of all of them."""

    name: str
    category: Category
    count: int
    bytes: int


class Tracer(Protocol):
    """What records a step at any batch size (any_model.Tracer)."""

    machine: Machine
    autocast: Any
    train: bool

    @property
    def runtime(self) -> Runtime: ...
    @property
    def num_parameters(self) -> int: ...
    def record(self, batch_size: int) -> Recorded: ...
    def on(self, gpu: str) -> Tracer: ...


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """A model's step at one batch size on one card, by every counter. All figures in bytes.

    `requested_bytes` are live tensors; `allocated_bytes` add the allocator's slack and the scratch
    of libraries and kernels. `phases` are the requested peaks of each phase.
    """

    batch_size: int
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: BytesBand
    process_bytes: BytesBand
    peak_phase: Phase
    phases: dict[Phase, int]
    tensors: tuple[TracedTensor, ...]
    attention: dict[str, int]
    notes: tuple[str, ...]
    timeline: Timeline
    tracer: Tracer
    seq_len: int | None = None  # where the batch was made of tokens
    _largest: dict[str, int | None] = field(default_factory=dict)

    def __repr__(self) -> str:
        fits = "fits" if self.fits else "does not fit"
        return (
            f"<Trace of batch {self.batch_size} on {self.gpu.id}: {gib(self.allocated_bytes)}"
            f" allocated in {self.peak_phase}, {fits}>"
        )

    @classmethod
    def of(cls, tracer: Tracer, batch_size: int) -> Trace:
        """Record a step and read it."""
        recorded = tracer.record(batch_size)
        timeline, runtime = recorded.timeline, tracer.runtime
        alive, _ = timeline.read(1)
        requested, phases = timeline.read(1, workspace=False)
        reserved, allocated = reserved_band(timeline, 1, runtime, alive.bytes)
        return cls(
            batch_size=batch_size,
            requested_bytes=requested.bytes,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            process_bytes=process_band(reserved, runtime),
            peak_phase=alive.phase,
            phases=phases,
            tensors=tuple(_tensors(timeline)),
            attention=recorded.attention,
            notes=recorded.notes,
            timeline=timeline,
            tracer=tracer,
        )

    @property
    def gpu(self) -> Gpu:
        """The card it was traced for."""
        return self.tracer.machine.gpu

    @property
    def peak_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` would say."""
        return self.allocated_bytes

    @property
    def capacity_bytes(self) -> int:
        """What a process can have of the card."""
        return self.tracer.machine.capacity_bytes

    @property
    def fits(self) -> bool:
        """Whether the most pessimistic process size is within the card."""
        return self.process_bytes.high <= self.capacity_bytes

    def largest_batch(self, gpu: str | None = None) -> int | None:
        """Return the most sequences that fit the card, or another: 0 for none, None for no end.

        It is a division where every tensor's bytes are a line over the batch, which three traces
        tell; else a search by traces.

        Raises:
            SnugError: the model can't run at other batch sizes.
        """
        tracer = self.tracer if gpu is None else self.tracer.on(gpu)
        card = tracer.machine.gpu.id
        if card not in self._largest:
            self._largest[card] = largest_batch(tracer)
        return self._largest[card]

    def to_dict(self) -> dict[str, Any]:
        """The whole as plain values for JSON, with the largest batch; null where it has no end."""
        try:
            largest, notes = self.largest_batch(), self.notes
        except SnugError as error:
            largest, notes = None, (*self.notes, f"no largest batch: {error.message}")
        return {
            "gpu": self.gpu.id,
            "fits": self.fits,
            "train": self.tracer.train,
            "parameters": self.tracer.num_parameters,
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "largest_batch": largest,
            "autocast": dtype_name(self.tracer.autocast),
            "requested_bytes": self.requested_bytes,
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": msgspec.to_builtins(self.reserved_bytes),
            "process_bytes": msgspec.to_builtins(self.process_bytes),
            "capacity_bytes": self.capacity_bytes,
            "headroom_bytes": self.capacity_bytes - self.process_bytes.high,
            "peak_phase": self.peak_phase,
            "phases": dict(self.phases),
            "tensors": msgspec.to_builtins(self.tensors[:SHOWN_TENSORS]),
            "attention": dict(self.attention),
            "notes": list(notes),
        }


def dtype_name(dtype: Any) -> str | None:
    """`bfloat16` of torch.bfloat16."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def largest_batch(tracer: Tracer) -> int | None:
    """See `Trace.largest_batch`."""
    line = _line(tracer)

    def process_bytes(batch: int) -> int:
        if line is None or batch < min(LINE_BATCHES):  # one sequence may go a way of its own
            return _process_high(tracer.record(batch).timeline, 1, tracer.runtime)
        return _process_high(line, batch, tracer.runtime)

    def first_guess(batch: int) -> int:
        if line is None or batch < min(LINE_BATCHES):
            return process_bytes(batch)
        return highest_process_bytes(line.peak_bytes(batch), tracer.runtime)

    capacity = tracer.machine.capacity_bytes
    found = _largest_below(capacity, first_guess)
    if found is None:
        return None
    above = found + 1
    while found and (size := process_bytes(found)) > capacity:
        found, above = min(found - 1, int(found * capacity / size)), found
    while above - found > 1:
        middle = (found + above) // 2
        found, above = (middle, above) if process_bytes(middle) <= capacity else (found, middle)
    return found


def _largest_below(capacity: int, process_bytes) -> int | None:
    """The largest batch whose process fits, 0 if none does, None if all do."""
    if process_bytes(1) > capacity:
        return 0
    low, high = 1, 2
    while process_bytes(high) <= capacity:
        low, high = high, 2 * high
        if high > LARGEST_BATCH:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if process_bytes(middle) <= capacity:
            low = middle
        else:
            high = middle
    return low


def _line(tracer: Tracer) -> Timeline | None:
    """The timeline over the batch, None where the model's tensors are no lines over it."""
    one, other = (tracer.record(batch).timeline for batch in LINE_BATCHES)
    line = line_through(one, LINE_BATCHES[0], other, LINE_BATCHES[1])
    if line is None or not holds_at(line, CHECK_BATCH, tracer.record(CHECK_BATCH).timeline):
        return None
    return line


def _process_high(timeline: Timeline, batch: int, runtime: Runtime) -> int:
    alive, _ = timeline.read(batch)
    reserved, _ = reserved_band(timeline, batch, runtime, alive.bytes)
    return process_band(reserved, runtime).high


def _tensors(timeline: Timeline) -> Iterator[TracedTensor]:
    """What is alive at the peak, layers together, largest first."""
    alive, _ = timeline.read(1)
    found: dict[tuple[str, Category], list[int]] = {}
    for buffer, count in alive.buffers.items():
        sums = found.setdefault((LAYER.sub("*", buffer.name), buffer.category), [0, 0])
        sums[0] += count
        sums[1] += count * timeline.bytes_of(buffer, 1)
    for (name, category), (count, size) in sorted(found.items(), key=lambda item: -item[1][1]):
        if size:
            yield TracedTensor(name=name, category=category, count=count, bytes=size)

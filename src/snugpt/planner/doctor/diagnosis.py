"""What happened, what held the memory and why it was not enough: three lines.

An allocation fails for one of few reasons, and the numbers of the message tell them apart. With
A asked for, F free, T the card, R reserved (tensors and cache) and C the cache alone:

    spilled      R > T: more than the card, in shared host memory, which is slow
    too_large    A > T: no card of this size could hold the one tensor
    limited      the program allowed itself less than the card has
    fragmented   F < A <= F + C: free bytes enough, but not in one piece
    others       A <= F + what other processes hold
    unexplained  A <= F: a limit outside PyTorch, or memory that is free again
    full         else: this program's own tensors fill the card
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from snugpt.planner.doctor.program import ProgramRun
from snugpt.planner.doctor.report import (
    BackwardTwice,
    CollectiveTimeout,
    Event,
    Killed,
    NoKernels,
    NotANumber,
    OutOfMemory,
    SharedMemory,
)
from snugpt.spec.memory import MemoryEstimate
from snugpt.units import MIB, gib, plural

Cause = Literal[
    "spilled", "too_large", "limited", "fragmented", "others", "unexplained", "full", "unknown"
]
# The one that ended the run, where several are in a log: who waits for a rank that is out of
# memory times out, and torchrun kills the rest.
_FIRST = (
    OutOfMemory,
    NoKernels,
    BackwardTwice,
    SharedMemory,
    NotANumber,
    Killed,
    CollectiveTimeout,
)
NAMES: dict[str, str] = {"cuda": "CUDA", "hip": "ROCm", "xpu": "XPU", "mps": "Apple's GPU",
                         "cpu": "the host"}  # fmt: skip
SHOWN_CATEGORIES = 4
# Beside the allocator's memory a process has a context and libraries; more than this is others'.
UNEXPLAINED_BYTES = 2048 * MIB


def main_event(events: Sequence[Event]) -> Event | None:
    """The event that ended the run: the first of the gravest kind."""
    for kind in _FIRST:
        for event in events:
            if isinstance(event, kind):
                return event
    return None


def cause_of(event: OutOfMemory) -> Cause:
    """Return why an allocation failed, as far as its numbers tell."""
    tried, free, capacity = event.tried_bytes, event.free_bytes, event.capacity_bytes
    reserved, cached = event.reserved_bytes, event.cached_bytes or 0
    if reserved is not None and capacity is not None and reserved > capacity:
        return "spilled"
    if tried is None or capacity is None:
        return "unknown"
    if tried > capacity:
        return "too_large"
    if free is None:
        return "full"
    if tried <= free:
        if event.limit_bytes is not None:
            return "limited"
        return "unexplained"
    if tried <= free + cached:
        return "fragmented"
    return "others" if tried <= free + event.others_bytes + hidden_bytes(event) else "full"


def hidden_bytes(event: OutOfMemory) -> int:
    """What nobody listed holds of the card: other programs, where the driver does not name them."""
    if event.capacity_bytes is None or event.free_bytes is None or event.backend == "mps":
        return 0
    own = event.process_bytes if event.process_bytes is not None else event.reserved_bytes
    if own is None:
        return 0
    rest = event.capacity_bytes - event.free_bytes - own - event.others_bytes
    return rest if rest > UNEXPLAINED_BYTES else 0


def what_happened(event: Event, events: Sequence[Event], run: ProgramRun) -> str:
    """Return the first line: which failure, where, how far the run had come."""
    if isinstance(event, OutOfMemory):
        return _out_of_memory(event, events, run)
    when = _when(event, run)
    if isinstance(event, NotANumber):
        before = "" if event.last_finite is None else f", {event.last_finite:g} before it"
        step = "" if event.step is None else f" in step {event.step}"
        return f"{event.what} is {event.value}{step}{before}"
    if isinstance(event, BackwardTwice):
        return f"backward went through the same graph twice{_at(event.place.where)}{when}"
    if isinstance(event, CollectiveTimeout):
        return _timeout(event, events)
    if isinstance(event, SharedMemory):
        return f"a worker of the data loader found the shared memory (/dev/shm) full{when}"
    if isinstance(event, NoKernels):
        card = event.card or "the card"
        return f"this PyTorch has no kernels for {card}{_capability(event)}"
    who = "the process" if event.rank is None else f"rank {event.rank}"
    size = "" if event.resident_bytes is None else f" at {gib(event.resident_bytes)} of RAM"
    how = "by the kernel, out of memory" if event.proven else "by SIGKILL (exit 137)"
    return f"{who} was killed {how}{size}{when}"


def what_held(event: Event, run: ProgramRun, planned: MemoryEstimate | None) -> str:
    """Return the second line: what the memory was full of, by the message and by the plan."""
    parts = list(_by_message(event)) if isinstance(event, OutOfMemory) else []
    if planned is not None and isinstance(event, OutOfMemory | Killed):
        parts.append(_by_plan(planned))
    if parts:
        return "; ".join(parts)
    if isinstance(event, OutOfMemory | Killed | SharedMemory):
        return "the log does not say"
    return "memory was not the trouble"


def why(event: Event, events: Sequence[Event], run: ProgramRun) -> str:
    """Return the third line: the reason, as far as it can be told."""
    if isinstance(event, OutOfMemory):
        return _why_full(event)
    if isinstance(event, NotANumber):
        if run.half:
            return "fp16 overflows above 65504; bf16 and fp32 do not"
        return "most often a learning rate too high for the batch, or numbers out of range in fp16"
    if isinstance(event, BackwardTwice):
        return (
            "the first backward frees what forward saved; a tensor from an earlier step is in this"
            " loss, or backward is called twice for one forward"
        )
    if isinstance(event, CollectiveTimeout):
        return _why_waited(event, events)
    if isinstance(event, SharedMemory):
        return "workers hand batches over in shared memory; a container has 64 MiB unless told"
    if isinstance(event, NoKernels):
        return "its wheel was built without this card's generation"
    if event.proven:
        return "the host's RAM, or the container's share of it, was full: not the GPU's memory"
    return (
        "SIGKILL has no message; most often the host's RAM or the container's limit was full, else"
        " somebody or the scheduler ended it (dmesg -T | grep -i kill tells)"
    )


def _out_of_memory(event: OutOfMemory, events: Sequence[Event], run: ProgramRun) -> str:
    others = [e for e in events if isinstance(e, OutOfMemory)]
    ranks = sorted({e.rank for e in others if e.rank is not None})
    device = "" if event.device is None else f" on GPU {event.device}"
    who = f" (ranks {_listed(ranks)})" if len(ranks) > 1 else ""
    who = f" (rank {ranks[0]})" if len(ranks) == 1 else who
    phase = {"load": " before the first step", None: ""}.get(
        event.place.phase, f" in {event.place.phase}"
    )
    text = f"{NAMES[event.backend]} ran out of memory{device}{who}{phase}"
    if event.place.phase != "load":
        text += _when(event, run)
    if event.tried_bytes is None:
        return text
    text += f": {gib(event.tried_bytes)} were asked for"
    if event.place.shape:
        text += f" ({_buffer(event.place.shape, run)})"
    if event.free_bytes is not None and event.capacity_bytes is not None:
        text += f", {gib(event.free_bytes)} of {gib(event.capacity_bytes)} were free"
    return text


def _buffer(shape: tuple[int, ...], run: ProgramRun) -> str:
    """The sizes of a buffer, with what its rows are where they are the tokens of a micro-batch."""
    sizes = " x ".join(map(str, shape))
    batch, length = run.batch, run.seq_len
    if batch and length and len(shape) == 2 and shape[0] == batch * length:
        return f"{sizes}: a row for each of {batch} x {length} tokens"
    return sizes


def _when(event: Event, run: ProgramRun) -> str:
    return "" if run.steps is None else f", after step {run.steps} was logged"


def _at(where: str | None) -> str:
    return "" if where is None else f" at {where}"


def _by_message(event: OutOfMemory) -> Iterator[str]:
    if event.allocated_bytes is None:
        return
    parts = [f"{gib(event.allocated_bytes)} tensors"]
    if event.cached_bytes:
        parts.append(f"{gib(event.cached_bytes)} cached and unused")
    if event.process_bytes is not None:
        outside = event.process_bytes - (event.reserved_bytes or 0)
        if outside > MIB:
            parts.append(f"{gib(outside)} CUDA and libraries")
    parts += [f"{gib(other.bytes)} process {other.pid}" for other in event.others[:3]]
    hidden = hidden_bytes(event)
    if hidden:
        parts.append(f"{gib(hidden)} others, unnamed")
    yield ", ".join(parts)


def _by_plan(planned: MemoryEstimate) -> str:
    sizes: dict[str, int] = {}
    for term in planned.terms:
        sizes[term.category] = sizes.get(term.category, 0) + term.bytes
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:SHOWN_CATEGORIES]
    listed = ", ".join(f"{name} {gib(size)}" for name, size in largest)
    return (
        f"predicted at the peak, in {planned.peak_phase}: {listed}; process up to"
        f" {gib(planned.process_bytes.high)}"
    )


def _why_full(event: OutOfMemory) -> str:
    cause = cause_of(event)
    if cause == "spilled":
        return (
            "the card was full before: the driver had moved the rest to the host's memory, slowly"
        )
    if cause == "too_large":
        return "one tensor alone is larger than the card"
    if cause == "limited":
        limit = gib(event.limit_bytes or 0)
        return f"the program limits itself to {limit} of the card"
    if cause == "fragmented":
        return "fragmented: enough was free or cached, but not in one piece"
    if cause == "others":
        held = event.others_bytes + hidden_bytes(event)
        return f"others hold {gib(held)} of the card; without them it would have gone on"
    if cause == "unexplained":
        return "more was free than was asked for: a limit outside PyTorch, or memory freed since"
    if cause == "full":
        return "the card is full with this program's own tensors"
    if event.backend == "cpu":
        return "the host's RAM, or the container's share of it, was full"
    return "the message has no sizes: the card was full when the program came to it"


def _timeout(event: CollectiveTimeout, events: Sequence[Event]) -> str:
    ranks = waiting_ranks(events)
    who = f"{plural(len(ranks), 'rank')} ({_listed(ranks)})" if ranks else "a rank"
    limit = "" if event.timeout_s is None else f" {event.timeout_s:g} s"
    return f"{who} waited{limit} for others in {event.operation.lower() or 'a collective'}"


def waiting_ranks(events: Sequence[Event]) -> list[int]:
    """The ranks that reported a time-out."""
    waited = [e for e in events if isinstance(e, CollectiveTimeout)]
    return sorted({rank for e in waited for rank in e.ranks})


def _why_waited(event: CollectiveTimeout, events: Sequence[Event]) -> str:
    numbers: dict[int, int] = {}
    for each in events:
        if isinstance(each, CollectiveTimeout):
            for rank, number in each.sequence:
                numbers[rank] = min(number, numbers.get(rank, number))
    if len(set(numbers.values())) > 1:
        behind = min(numbers, key=lambda rank: (numbers[rank], rank))
        return (
            f"rank {behind} is behind: it waits in collective {numbers[behind]}, others further on"
        )
    missing = sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers))
    if missing:
        return (
            f"rank {_listed(missing)} did not come: look at its own lines, it is the one that hangs"
        )
    return "all ranks wait in the same collective: the network, or a rank that died without a word"


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown + (", ..." if len(ranks) > 8 else "")


def _capability(event: NoKernels) -> str:
    if event.capability is None:
        return ""
    return f" (capability {event.capability[0]}.{event.capability[1]})"

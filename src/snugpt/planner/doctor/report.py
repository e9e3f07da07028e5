"""What a log tells, as typed values: one event per failure. All sizes in bytes.

A size that the message does not say is None, never 0.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Backend = Literal["cuda", "hip", "xpu", "mps", "cpu"]
# Where a traceback stood. `load` is before the first step: building, moving, restoring the model.
LoggedPhase = Literal["load", "forward", "loss", "backward", "clip", "optimizer", "evaluate"]


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a failure was raised: the innermost line of the user's own code, and what it did.

    `shape` is that of the buffer a compiled step asked for, where the traceback shows it.
    """

    phase: LoggedPhase | None = None
    where: str | None = None  # file:line
    shape: tuple[int, ...] | None = None


class ProcessUse(msgspec.Struct, frozen=True):
    """A process on the card, by the driver's count."""

    pid: int
    bytes: int


class OutOfMemory(msgspec.Struct, frozen=True, kw_only=True, tag="out_of_memory"):
    """An allocation that failed, as PyTorch reports it.

    `allocated_bytes` are live tensors, `cached_bytes` what the allocator holds beside them
    ("reserved but unallocated"), `process_bytes` all of this process by the driver's count,
    `others` the other processes it lists, `limit_bytes` what the program allowed itself.
    `setting` is the allocator's against fragmentation, as the message spells it.
    """

    backend: Backend
    line: int
    rank: int | None = None
    device: int | None = None
    tried_bytes: int | None = None
    capacity_bytes: int | None = None
    free_bytes: int | None = None
    allocated_bytes: int | None = None
    cached_bytes: int | None = None
    process_bytes: int | None = None
    others: tuple[ProcessUse, ...] = ()
    limit_bytes: int | None = None
    setting: str | None = None
    place: Place = Place()

    @property
    def reserved_bytes(self) -> int | None:
        """What the allocator held: tensors and its cache."""
        if self.allocated_bytes is None:
            return None
        return self.allocated_bytes + (self.cached_bytes or 0)

    @property
    def others_bytes(self) -> int:
        """What the other listed processes held."""
        return sum(other.bytes for other in self.others)


class Killed(msgspec.Struct, frozen=True, kw_only=True, tag="killed"):
    """A process ended by SIGKILL. `proven` where the system itself says that memory was why."""

    line: int
    rank: int | None = None
    proven: bool = False
    resident_bytes: int | None = None
    text: str = ""


class SharedMemory(msgspec.Struct, frozen=True, kw_only=True, tag="shared_memory"):
    """A loader's worker that found /dev/shm full."""

    line: int
    rank: int | None = None


class BackwardTwice(msgspec.Struct, frozen=True, kw_only=True, tag="backward_twice"):
    """Backward through a graph whose saved tensors were freed by the first."""

    line: int
    rank: int | None = None
    place: Place = Place()


class NotANumber(msgspec.Struct, frozen=True, kw_only=True, tag="not_a_number"):
    """The first loss that is NaN or infinite, and the last finite one before it."""

    line: int
    rank: int | None = None
    what: str = "loss"
    value: str = "nan"
    step: int | None = None
    last_finite: float | None = None


class CollectiveTimeout(msgspec.Struct, frozen=True, kw_only=True, tag="collective_timeout"):
    """A collective that did not end in time. `ranks` are those that waited."""

    line: int
    rank: int | None = None
    ranks: tuple[int, ...] = ()
    operation: str = ""
    timeout_s: float | None = None
    sequence: tuple[tuple[int, int], ...] = ()  # (rank, number of the collective it waited in)


class NoKernels(msgspec.Struct, frozen=True, kw_only=True, tag="no_kernels"):
    """A PyTorch build without kernels for the card."""

    line: int
    rank: int | None = None
    card: str | None = None
    capability: tuple[int, int] | None = None


Event = (
    OutOfMemory | Killed | SharedMemory | BackwardTwice | NotANumber | CollectiveTimeout | NoKernels
)

"""Memory snapshots: what `torch.cuda.memory._dump_snapshot(file)` wrote, read with nothing run.

The file is a pickled dict of plain values (THCPModule_memorySnapshot in torch/csrc/cuda/Module.cpp;
`torch.cuda.memory._snapshot` documents it): the segments as they were at the end, and per device
the history of what the allocator did, if `_record_memory_history` was on. `plain_pickle` reads it
and can't call anything; here its shape is checked and what is needed is kept. Unknown keys are left
alone. A file that is damaged, cut short or made to harm is a `FailedError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from snugpt.errors import BadQuestionError, FailedError
from snugpt.estimate.blocks import DEFAULT_OWNER, PoolKey
from snugpt.estimate.plain_pickle import DamagedError, load_plain
from snugpt.units import GIB, gib

MAX_FILE_BYTES = 2 * GIB
MAX_ENTRIES = 20_000_000  # segments, blocks and events together; one may stand in a file often
MAX_KEYS = 64  # of one segment, block or event: PyTorch writes about a dozen
FRAMES_KEPT, FRAMES_LOOKED_AT = 3, 256
GZIP = b"\x1f\x8b"  # RFC 1952, section 2.3.1
NO_FRAMES: list[object] = []

Action = Literal[
    "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map",
    "segment_unmap", "snapshot", "oom",
]  # fmt: skip
BlockStatus = Literal["active_allocated", "active_pending_free", "active_awaiting_free", "inactive"]
LARGEST_BYTES = 2**43  # 8 TiB: no card has that
Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=LARGEST_BYTES)]


class Frame(msgspec.Struct, frozen=True):
    """One line of a call stack."""

    filename: str
    line: int
    name: str


class BlockState(msgspec.Struct, frozen=True, kw_only=True):
    """A block of a segment when the snapshot was taken."""

    size: Positive
    state: BlockStatus
    requested_size: Natural = 0
    address: Natural = 0
    frames: tuple[Frame, ...] = ()


class SegmentState(msgspec.Struct, frozen=True, kw_only=True):
    """Memory the allocator held: a segment, or one stretch of an expandable one."""

    address: Natural
    total_size: Positive
    segment_type: Literal["small", "large"]
    stream: int = 0
    device: int = 0
    segment_pool_id: tuple[int, int] = DEFAULT_OWNER
    is_expandable: bool = False
    blocks: tuple[BlockState, ...] = ()

    @property
    def pool(self) -> PoolKey:
        """The pool that its blocks belong to."""
        return PoolKey(self.segment_type == "small", self.stream, self.segment_pool_id)


class SnapshotEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing the allocator did; `size` is what was asked for where a tensor is concerned."""

    action: Action
    size: Natural
    addr: Natural = 0
    stream: int = 0
    time_us: int = 0
    device_free: Natural = 0  # what the driver had left, where memory ran out
    pool_id: tuple[int, int] = DEFAULT_OWNER
    frames: tuple[Frame, ...] = ()


class Annotation(msgspec.Struct, frozen=True, kw_only=True):
    """Begin or end of a `record_function` range."""

    name: str
    stage: Literal["START", "END"]
    time_us: int = 0
    device: int = 0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the allocator was told, as far as it matters here."""

    PYTORCH_CUDA_ALLOC_CONF: str = ""
    expandable_segments: bool = False
    max_split_size: int = -1  # -1: no limit
    garbage_collection_threshold: float = 0.0
    roundup_power2_divisions: dict[str, int] = {}


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One device of a snapshot: its segments at the end and what led to them."""

    device: int
    segments: tuple[SegmentState, ...]
    events: tuple[SnapshotEvent, ...]
    annotations: tuple[Annotation, ...] = ()
    settings: Settings = Settings()

    @property
    def expandable(self) -> bool:
        """Whether segments could grow."""
        return self.settings.expandable_segments or any(s.is_expandable for s in self.segments)


def read_snapshot(path: Path, device: int | None = None) -> Snapshot:
    """Read a snapshot; of several devices the one with the longest history unless `device` says.

    Raises FailedError for a file that is no sound snapshot, BadQuestionError for a device or a file
    that is not there.
    """
    data = _bytes_of(path)
    if data.startswith(GZIP):
        raise FailedError(f"{path} is packed with gzip", hint=_unpacking(path))
    try:
        return _Reader().snapshot(load_plain(data), device)
    except DamagedError as error:
        why = str(error)
    except msgspec.ValidationError as error:
        why = f"a value is not what PyTorch writes: {error}"
    except MemoryError:
        why = "it needs more memory than there is"
    raise FailedError(
        f"{path} is no CUDA memory snapshot: {why}",
        hint="write one with torch.cuda.memory._dump_snapshot('snapshot.pickle')",
    ) from None


def _unpacking(path: Path) -> str:
    """The command that unpacks a file beside itself; gunzip wants a name that ends in .gz."""
    import shlex

    name = shlex.quote(str(path))
    if path.suffix == ".gz":
        return f"gunzip -k {name}"
    return f"gunzip < {name} > {shlex.quote(str(path) + '.unpacked')}"


def _bytes_of(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise BadQuestionError(
                f"snapshot = {str(path)!r} is no file",
                hint="write one with torch.cuda.memory._dump_snapshot('snapshot.pickle')",
            )
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise FailedError(
                f"{path} has {gib(size)}; snapshots up to {gib(MAX_FILE_BYTES)} are read",
                hint="record less: torch.cuda.memory._record_memory_history(max_entries=200000)",
            )
        return path.read_bytes()
    except OSError as error:
        raise FailedError(f"{path} can't be read: {error.strerror}", hint=f"ls -l {path}") from None
    except MemoryError:
        raise FailedError(f"{path} does not fit into memory", hint=f"ls -l {path}") from None


class _Reader:
    """Turns plain values into a Snapshot. Shared values are counted each time they are met, so a
    file can't make the work longer than `MAX_ENTRIES`."""

    def __init__(self) -> None:
        self._entries_left = MAX_ENTRIES
        self._frames: dict[int, tuple[Frame, ...]] = {}

    def snapshot(self, plain: object, device: int | None) -> Snapshot:
        """Check the whole and pick one device."""
        if type(plain) is not dict or not {"segments", "device_traces"} <= plain.keys():
            raise DamagedError("it is no dict with segments and device_traces")
        segments = [self._segment(each) for each in self._list(plain, "segments")]
        traces = self._list(plain, "device_traces")
        if not all(type(trace) is list for trace in traces):
            raise DamagedError("a device trace is no list")
        lengths = [len(trace) for trace in traces if isinstance(trace, list)]
        there = {i for i, length in enumerate(lengths) if length} | {s.device for s in segments}
        if device is None:
            device = max(sorted(there), key=lambda i: dict(enumerate(lengths)).get(i, 0), default=0)
        elif device not in there:
            known = ", ".join(str(each) for each in sorted(there)) or "none"
            raise BadQuestionError(f"device = {device} is not in the snapshot: {known}")
        trace = traces[device] if 0 <= device < len(traces) else []
        assert isinstance(trace, list)
        self._count(len(trace))
        kept = sorted((s for s in segments if s.device == device), key=lambda s: s.address)
        for before, after in pairwise(kept):
            if before.address + before.total_size > after.address:
                raise DamagedError(f"segments overlap at {after.address:#x}")
        return Snapshot(
            device=device,
            segments=tuple(kept),
            events=tuple(self._event(each) for each in trace),
            annotations=tuple(a for a in self._annotations(plain) if a.device == device),
            settings=msgspec.convert(plain.get("allocator_settings", {}), Settings),
        )

    def _segment(self, plain: object) -> SegmentState:
        fields = self._fields(plain)
        blocks = [self._block(each) for each in self._list(fields, "blocks")]
        segment = msgspec.convert(fields | {"blocks": ()}, SegmentState)
        placed, address = [], segment.address
        for block in blocks:
            if block.address not in (0, address):
                raise DamagedError(f"a block of the segment at {segment.address:#x} is elsewhere")
            placed.append(msgspec.structs.replace(block, address=address))
            address += block.size
        if address != segment.address + segment.total_size:
            raise DamagedError(f"its blocks do not fill the segment at {segment.address:#x}")
        return msgspec.structs.replace(segment, blocks=tuple(placed))

    def _block(self, plain: object) -> BlockState:
        fields = self._fields(plain)
        frames = self._top(fields.pop("frames", NO_FRAMES))
        return msgspec.structs.replace(msgspec.convert(fields, BlockState), frames=frames)

    def _event(self, plain: object) -> SnapshotEvent:
        fields = self._fields(plain)
        frames = self._top(fields.pop("frames", NO_FRAMES))
        event = msgspec.convert(fields, SnapshotEvent)
        if event.size > LARGEST_BYTES and event.action != "oom":
            raise DamagedError(f"an event has {event.size:,} bytes")
        return msgspec.structs.replace(event, frames=frames) if frames else event

    def _annotations(self, plain: dict[str, object]) -> Iterator[Annotation]:
        """The annotations with a name and a stage; others are not ranges."""
        if "external_annotations" not in plain:
            return
        for each in self._list(plain, "external_annotations"):
            fields = self._fields(each)
            if {"name", "stage"} <= fields.keys():
                yield msgspec.convert(fields, Annotation)

    def _list(self, plain: dict[str, object], key: str) -> list[object]:
        found = plain.get(key)
        if type(found) is not list:
            raise DamagedError(f"{key} is no list")
        self._count(len(found))
        return found

    def _count(self, entries: int) -> None:
        self._entries_left -= entries
        if self._entries_left < 0:
            raise DamagedError(f"it holds more than {MAX_ENTRIES:,} entries")

    def _fields(self, plain: object) -> dict[str, object]:
        if type(plain) is not dict or len(plain) > MAX_KEYS:
            raise DamagedError("an entry is no dict of a few keys")
        return dict(plain)

    def _top(self, plain: object) -> tuple[Frame, ...]:
        """The innermost frames of the user's own code, else the innermost of all."""
        found = self._frames.get(id(plain))
        if found is None:
            if type(plain) is not list:
                raise DamagedError("a call stack is no list")
            stack = [msgspec.convert(each, Frame) for each in plain[:FRAMES_LOOKED_AT]]
            own = [frame for frame in stack if is_users(frame)]
            found = self._frames[id(plain)] = tuple((own or stack)[:FRAMES_KEPT])
        return found


def is_users(frame: Frame) -> bool:
    """Whether a frame is Python code that is not PyTorch's or another package's."""
    name = frame.filename.replace("\\", "/")
    return name.endswith(".py") and not any(
        part in name for part in ("/site-packages/", "/dist-packages/", "/torch/", "/lib/python")
    )

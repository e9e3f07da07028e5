"""A snapshot as a Timeline: the third source of events, for the same reader.

A buffer is named by the innermost frame of the user's own code; its formula is the call stack. A
snapshot does not say what a tensor is for nor which phase it is, unless the run named its phases
with `record_function` while annotations were recorded (`global_record_annotations=True`); what is
not known is of category "unknown" and phase "recorded".
"""

from __future__ import annotations

from typing import get_args

from snugpt.estimate.history import beginning
from snugpt.estimate.operations import Buffer
from snugpt.estimate.snapshot import Annotation, Frame, Snapshot
from snugpt.estimate.timeline import Event, Placed, Segment, Timeline
from snugpt.spec.memory import Phase
from snugpt.spec.runtime import CUDA_BLOCK_BYTES

NOT_NAMED = "no call stack"
BEFORE = "before the recording"
_PHASES: dict[str, Phase] = {name: name for name in get_args(Phase)}


def timeline_of_snapshot(snapshot: Snapshot) -> Timeline:
    """Return what a snapshot recorded; its bytes do not depend on a batch.

    Memory is counted from where a tensor was allocated to where its free was asked for, as
    `torch.cuda.memory_allocated` counts it, but without the unsplit rest of blocks.
    """
    names = _Names()
    live = {
        block.address: names.buffer(block.frames, block.requested_bytes or block.size, BEFORE)
        for blocks in beginning(snapshot).blocks.values()
        for block in blocks
        if not block.awaiting
    }
    resident = tuple(live.values())
    placed: list[Placed] = []
    events: list[Event] = []
    clock = _Phases(snapshot.annotations)
    phase: Phase = "recorded"
    for event in snapshot.events:
        now = clock.at(event.time_us)
        if now != phase and events:
            placed.append(Placed(phase, 0, Segment(events, CUDA_BLOCK_BYTES)))
            events = []
        phase = now
        if event.action == "alloc":
            if event.addr in live:  # its free was not recorded
                events.append(Event(-1, live.pop(event.addr)))
            live[event.addr] = names.buffer(event.frames, event.size, NOT_NAMED)
            events.append(Event(1, live[event.addr]))
        elif event.action in ("free_requested", "free_completed") and event.addr in live:
            events.append(Event(-1, live.pop(event.addr)))
    placed.append(Placed(phase, 0, Segment(events, CUDA_BLOCK_BYTES)))
    return Timeline(resident, tuple(placed), CUDA_BLOCK_BYTES)


class _Names:
    """One buffer for all tensors of one call stack and size, so that they are counted together."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[tuple[Frame, ...], int, str], Buffer] = {}

    def buffer(self, frames: tuple[Frame, ...], num_bytes: int, unnamed: str) -> Buffer:
        key = frames, num_bytes, "" if frames else unnamed
        found = self._buffers.get(key)
        if found is None:
            stack = [frame_name(frame) for frame in frames] or [unnamed]
            found = Buffer(stack[0], "unknown", num_bytes, 0, " < ".join(stack))
            self._buffers[key] = found
        return found


class _Phases:
    """Which phase a moment belongs to: the innermost open range that bears a phase's name."""

    def __init__(self, annotations: tuple[Annotation, ...]) -> None:
        self._coming = sorted(
            (a for a in annotations if _phase_of(a) is not None),
            key=lambda annotation: annotation.time_us,
            reverse=True,
        )
        self._open: list[Phase] = []

    def at(self, time_us: int) -> Phase:
        """The phase at a time; to be asked in order."""
        while self._coming and self._coming[-1].time_us <= time_us:
            annotation = self._coming.pop()
            phase = _phase_of(annotation)
            if phase is not None and annotation.stage == "START":
                self._open.append(phase)
            elif phase in self._open:
                while self._open.pop() != phase:
                    pass
        return self._open[-1] if self._open else "recorded"


def _phase_of(annotation: Annotation) -> Phase | None:
    return _PHASES.get(annotation.name.rsplit(".", 1)[-1])


def frame_name(frame: Frame) -> str:
    """A frame in one word: `model.py:120 forward`. Nothing in it can steer a terminal."""
    file = frame.filename.replace("\\", "/").rsplit("/", 1)[-1]
    text = f"{file}:{frame.line} {frame.name}" if file else frame.name
    return "".join(each if each.isprintable() else "?" for each in text) or NOT_NAMED

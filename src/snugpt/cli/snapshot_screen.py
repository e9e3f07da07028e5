"""A memory snapshot on one screen of 80 columns: held and allocated, what filled it, the replay."""

from __future__ import annotations

from collections.abc import Iterator

from snugpt.cli.screen import COLUMNS, LABEL, row
from snugpt.estimate.recorded import timeline_of_snapshot
from snugpt.estimate.replay import Replay
from snugpt.estimate.snapshot import Snapshot
from snugpt.estimate.timeline import Alive
from snugpt.units import gib, plural

MOST_TENSORS = 10
MOST_OOMS = 3


def screen(replay: Replay, snapshot: Snapshot) -> str:
    """Return the text, each line at most 79 columns wide and none that can steer a terminal."""
    return "\n".join(line[:COLUMNS] for line in _lines(replay, snapshot))


def _lines(replay: Replay, snapshot: Snapshot) -> Iterator[str]:
    kind = "expandable segments" if replay.expandable else "native segments"
    yield f"memory snapshot of CUDA device {snapshot.device}, {kind}"
    num_segments = len(snapshot.segments)
    yield from row(
        "history",
        f"{plural(replay.num_events, 'event')}, {plural(num_segments, 'segment')} at the end",
    )
    yield ""
    yield from _counters(replay)
    yield from row("replay", _verdict(replay))
    yield from _out_of_memory(replay)
    yield ""
    alive, phases = timeline_of_snapshot(snapshot).read(1)
    yield from _peak(alive, phases, "peak" if replay.num_events else "held")
    for note in replay.notes:
        yield from row("note", note)


def _counters(replay: Replay) -> Iterator[str]:
    yield f"{'':{LABEL}}{'':20}{'recorded':>12}{'replayed':>12}"
    rows = (
        ("reserved, peak", replay.recorded_reserved_peak, replay.replayed_reserved_peak),
        ("reserved, at the end", replay.recorded_reserved_end, replay.replayed_reserved_end),
        ("allocated, peak", None, replay.replayed_allocated_peak),
        ("allocated, at the end", replay.recorded_allocated_end, replay.replayed_allocated_end),
    )
    for name, recorded, replayed in rows:
        if name.endswith("peak") and replay.num_events == 0:
            continue  # what is held at the end is no peak
        known = "-" if recorded is None else gib(recorded)
        yield f"{'':{LABEL}}{name:21}{known:>11}{gib(replayed):>12}"


def _verdict(replay: Replay) -> str:
    parting = replay.parting
    if parting is None and replay.num_events == 0:
        return "nothing to replay, so nothing is compared: the file holds no event"
    if parting is None:
        return "the simulated allocator did what the real one did, event by event"
    where = f"event {parting.index + 1:,} of {replay.num_events:,}"
    if parting.index >= replay.num_events:
        where = "the end"
    what = f"{parting.action} of {gib(parting.size)}" if parting.size else parting.action
    held = (
        f"{gib(parting.recorded_reserved_bytes)} recorded,"
        f" {gib(parting.replayed_reserved_bytes)} replayed"
    )
    if parting.recorded_reserved_bytes == parting.replayed_reserved_bytes:
        return f"the ways part at {where}, {what}: as much is held, but another block was taken"
    return f"the ways part at {where}, {what}: held {held}"


def _out_of_memory(replay: Replay) -> Iterator[str]:
    for event in replay.ooms[:MOST_OOMS]:
        yield from row(
            "OOM",
            f"{gib(event.size)} were asked for, the driver had {gib(event.device_free)} left",
        )
    if len(replay.ooms) > MOST_OOMS:
        yield from row("", f"and {len(replay.ooms) - MOST_OOMS:,} times more")


def _peak(alive: Alive, phases: dict[str, int], label: str) -> Iterator[str]:
    told = [f"{name} {gib(size)}" for name, size in phases.items() if name != "recorded"]
    where = f" in {alive.phase}" if told else ""
    yield from row(label, f"{gib(alive.bytes)} of tensors{where}, largest first (bytes, number,"
                   " where they were made):")  # fmt: skip
    stacks: dict[str, tuple[int, int]] = {}
    for buffer, number in alive.buffers.items():
        size, count = stacks.get(buffer.formula, (0, 0))
        stacks[buffer.formula] = size + number * buffer.fixed_bytes, count + number
    largest = sorted(stacks.items(), key=lambda item: -item[1][0])
    for stack, (size, count) in largest[:MOST_TENSORS]:
        yield f"{'':{LABEL}}{gib(size):>9}{count:>6} x {stack}"
    if len(largest) > MOST_TENSORS:
        rest = sum(size for _, (size, _) in largest[MOST_TENSORS:])
        count = sum(count for _, (_, count) in largest[MOST_TENSORS:])
        yield f"{'':{LABEL}}{gib(rest):>9}{count:>6} x {len(largest) - MOST_TENSORS} other places"
    if told:
        yield from row("phases", ", ".join(told))

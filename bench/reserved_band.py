"""How far reserved lies above allocated: as published, and as simulated when a step goes otherwise.

    python bench/reserved_band.py measured-open.jsonl

The file holds published measurements, one JSON object per line; rows with both counters are used.
They are of compiled runs. Of eager steps nothing is published, so those are simulated: whole steps
of several models, then the same steps with what a real run might do and the walk does not know:
events that come up to four places earlier or later, and scratch of up to 64 MiB in between. Said is
how much more or less each variation reserves than the step as walked, less what its own peak of
allocated is higher: the band is about what is held and not used.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from pathlib import Path

from estimate_speed import recipe_for
from snugpt.estimate import memory
from snugpt.estimate.operations import Buffer
from snugpt.estimate.simulation import simulate
from snugpt.estimate.timeline import Event, Placed, Segment, Timeline
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.runtime import runtime_for
from snugpt.spec.shape import STYLES, shape_for
from snugpt.units import MIB

SEVERAL_SHAPES = ("validation runs a forward pass over", "tokens per GPU and step grow")
VARIATIONS = 24
FARTHEST, SCRATCH_SHARE = 4, 0.02


def published(path: Path) -> None:
    """Print reserved / allocated of the published pairs, group by group."""
    groups: dict[str, list[float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        allocated, reserved = (row["measured"][f"{c}_mib"] for c in ("allocated", "reserved"))
        if not allocated or not reserved:
            continue
        several = any(text in row["notes"] for text in SEVERAL_SHAPES)
        shapes = "several shapes" if several else "one shape"
        cards = "1 GPU" if row["num_gpus"] == 1 else "2 to 8 GPUs"
        program = row["program"].split("@")[0]
        compiled = "compiled" if row["compile"] else "eager"
        for group in (
            f"{compiled}, {program}, {cards}, {shapes}", f"{compiled}, all, {shapes}",
        ):  # fmt: skip
            groups.setdefault(group, []).append(reserved / allocated)
    print("published reserved / allocated                          n    min median    max")
    for group, ratios in sorted(groups.items()):
        middle = statistics.median(ratios)
        print(f"{group:53}{len(ratios):4}{min(ratios):7.3f}{middle:7.3f}{max(ratios):7.3f}")


def varied(timeline: Timeline, chance: random.Random) -> Timeline:
    """The same step in a somewhat other order, with scratch here and there."""
    return Timeline(
        timeline.resident,
        tuple(
            Placed(phase, layer, _shuffled(segment, chance, timeline.block_bytes))
            for phase, layer, segment in timeline.placed
        ),
        timeline.block_bytes,
        timeline.aliases,
    )


def _shuffled(segment: Segment, chance: random.Random, block_bytes: int) -> Segment:
    events: list[Event] = list(segment.events)
    for index in range(len(events)):
        other = min(len(events) - 1, index + chance.randrange(FARTHEST + 1))
        between = {event.buffer for event in events[index : other + 1]}
        if len(between) == other + 1 - index:  # no tensor is freed before it is there
            events[index], events[other] = events[other], events[index]
    found: list[Event] = []
    for event in events:
        if chance.random() < SCRATCH_SHARE:
            scratch = Buffer("scratch", "workspace", chance.randrange(1, 64 * MIB), 0, "")
            found += [Event(1, scratch), Event(-1, scratch)]
        found.append(event)
    return Segment(found, block_bytes)


def simulated() -> None:
    """Print what the simulation reserves, and how variations of the step differ."""
    print()
    print(
        "simulated, eager, 1 GPU: reserved / allocated as walked; variations: reserved / as walked"
    )
    print("allocator    steps    min median    max      n    min median    95%    max")
    for expandable in (False, True):
        base, ratios = [], []
        for timeline, batch in steps():
            walked = simulate(timeline, batch, expandable=expandable)
            base.append(walked.reserved_bytes / walked.allocated_bytes)
            for seed in range(VARIATIONS):
                other = simulate(
                    varied(timeline, random.Random(seed)), batch, expandable=expandable
                )
                more = other.allocated_bytes - walked.allocated_bytes
                ratios.append((other.reserved_bytes - more) / walked.reserved_bytes)
        ratios.sort()
        print(
            f"{'expandable' if expandable else 'native':10}{len(base):8}{min(base):7.3f}"
            f"{statistics.median(base):7.3f}{max(base):7.3f}{len(ratios):7}{ratios[0]:7.3f}"
            f"{statistics.median(ratios):7.3f}{ratios[len(ratios) * 95 // 100]:7.3f}"
            f"{ratios[-1]:7.3f}"
        )


def steps() -> list[tuple[Timeline, int]]:
    """Training steps of every style: two depths, two batches, with and without checkpoints."""
    runtime = runtime_for(find_gpu("h100"), "bf16")
    return [
        (memory.timeline_of(shape, recipe_for(shape, batch, checkpoint), runtime), batch)
        for style in STYLES
        for shape in (shape_for(style, 6), shape_for(style, 12))
        for batch in (3, 16)
        for checkpoint in ("none", "blocks")
    ]


if __name__ == "__main__":
    published(Path(sys.argv[1]))
    simulated()

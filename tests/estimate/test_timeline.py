"""The timeline against a plain count over every instant, on random events and on real steps."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_questions import levers, question

from snugpt.estimate.operations import Buffer
from snugpt.estimate.timeline import Event, Placed, Segment, Timeline
from snugpt.estimate.training import TrainingStep
from snugpt.spec.shape import STYLES

PHASES = ("forward", "loss", "backward", "optimizer")
thorough = settings(max_examples=300, deadline=None, derandomize=True)


@st.composite
def buffers(draw, block_bytes: int) -> Buffer:
    """Bytes per sequence in whole blocks, where the envelope promises to be exact."""
    fixed = draw(st.integers(0, 2000))
    per_sequence = draw(st.integers(0, 30)) * block_bytes
    if per_sequence and block_bytes > 1:
        fixed = fixed // block_bytes * block_bytes
    category = draw(st.sampled_from(["activations", "workspace"]))
    return Buffer("tensor", category, fixed, per_sequence, "")


@st.composite
def timelines(draw) -> Timeline:
    """Random allocations and frees, cut into segments of which some are placed again."""
    block_bytes = draw(st.sampled_from([1, 512]))
    resident = tuple(draw(st.lists(buffers(block_bytes), max_size=3)))
    segments = []
    for _ in range(draw(st.integers(1, 4))):
        events, alive = [], []
        for frees in draw(st.lists(st.booleans(), max_size=12)):
            if frees and alive:
                events.append(Event(-1, alive.pop(draw(st.integers(0, len(alive) - 1)))))
            else:
                alive.append(draw(buffers(block_bytes)))
                events.append(Event(1, alive[-1]))
        segments.append(Segment(events, block_bytes))
    order = draw(st.lists(st.sampled_from(segments), min_size=1, max_size=8))
    phases = [draw(st.sampled_from(PHASES)) for _ in order]
    placed = tuple(Placed(p, 0, s) for p, s in zip(phases, order, strict=True))
    return Timeline(resident, placed, block_bytes)


def rounded(buffer: Buffer, batch: int, block_bytes: int) -> int:
    blocks, rest = divmod(buffer.fixed_bytes + batch * buffer.sequence_bytes, block_bytes)
    return (blocks + (rest > 0)) * block_bytes


def every_instant(timeline: Timeline, batch: int, *, workspace: bool = True) -> list[int]:
    """Bytes alive before the step and after each event."""

    def size(buffer: Buffer) -> int:
        counted = workspace or buffer.category != "workspace"
        return rounded(buffer, batch, timeline.block_bytes) if counted else 0

    instants = [sum(size(b) for b in timeline.resident)]
    for _, _, (sign, buffer) in timeline.events():
        instants.append(instants[-1] + sign * size(buffer))
    return instants


@thorough
@given(timelines(), st.integers(1, 1000))
def test_the_envelope_is_the_highest_of_all_instants_at_any_batch(timeline, batch):
    assert timeline.peak_bytes(batch) == max(every_instant(timeline, batch))


@thorough
@given(timelines(), st.integers(1, 1000), st.booleans())
def test_reading_finds_the_highest_instant_and_what_is_alive_at_it(timeline, batch, workspace):
    alive, phases = timeline.read(batch, workspace=workspace)
    highest = max(every_instant(timeline, batch, workspace=workspace))
    assert alive.bytes == highest
    held = sum(n * rounded(b, batch, timeline.block_bytes) for b, n in alive.buffers.items())
    assert held == highest
    assert max(phases.values()) == highest


@thorough
@given(timelines(), st.integers(1, 1000))
def test_the_peak_of_each_phase_is_the_highest_of_its_instants(timeline, batch):
    instants = every_instant(timeline, batch)
    wanted: dict[str, int] = {}
    index = 0
    for phase, _, segment in timeline.placed:
        own = instants[index : index + len(segment.events) + 1]
        wanted[phase] = max(wanted.get(phase, 0), *own)
        index += len(segment.events)
    assert timeline.read(batch)[1] == wanted
    crests = {p: max(line.at(batch) for line in lines) for p, lines in timeline.crests.items()}
    assert crests == wanted


def test_a_line_that_is_only_as_high_as_a_steeper_one_at_batch_one_is_left_out():
    flat, steep = (Buffer("t", "activations", *size, "") for size in ((10, 0), (9, 1)))
    events = [Event(1, flat), Event(-1, flat), Event(1, steep), Event(-1, steep)]
    timeline = Timeline((), (Placed("forward", 0, Segment(events, 1)),), 1)
    assert timeline.envelope == ((9, 1),)


@thorough
@given(timelines())
def test_every_line_of_the_envelope_is_the_highest_somewhere(timeline):
    slopes = [line.per_sequence for line in timeline.envelope]
    assert slopes == sorted(set(slopes))
    for one, other in zip(timeline.envelope, timeline.envelope[1:], strict=False):
        assert one.at(1) > other.at(1)
        assert one.fixed > other.fixed


@settings(max_examples=150, deadline=None, derandomize=True)
@given(levers(), st.integers(1, 64))
def test_a_real_steps_peak_is_what_its_alive_buffers_sum_to(asked, batch):
    timeline = TrainingStep(*question(asked)).timeline()
    alive, phases = timeline.read(batch)
    size = timeline.block_bytes
    held = sum(n * rounded(b, batch, size) for b, n in alive.buffers.items())
    assert alive.bytes == held == max(phases.values()) == max(every_instant(timeline, batch))
    tensors: Counter[Buffer] = Counter()
    for buffer, number in alive.buffers.items():
        tensors[timeline.aliases.get(buffer, buffer)] += number
    assert min(tensors.values()) >= 0
    if size == 1:
        assert timeline.peak_bytes(batch) == alive.bytes
    else:
        assert timeline.peak_bytes(batch) >= alive.bytes


@settings(max_examples=150, deadline=None, derandomize=True)
@given(levers(lengths=(256, 512, 1024)), st.integers(1, 64))
def test_on_cuda_the_envelope_is_exact_at_whole_blocks(asked, batch):
    timeline = TrainingStep(*question(asked)).timeline()
    exact, _ = timeline.read(batch)
    assert timeline.peak_bytes(batch) == exact.bytes


@settings(max_examples=200, deadline=None, derandomize=True)
@given(levers())
def test_a_step_gives_back_everything_that_it_took(asked):
    timeline = TrainingStep(*question(asked)).timeline()
    count: Counter[Buffer] = Counter()
    for _, _, (sign, buffer) in timeline.events():
        tensor = timeline.aliases.get(buffer, buffer)
        count[tensor] += sign
        assert count[tensor] >= 0, buffer.name
    assert {b.name: n for b, n in count.items() if n} == {}


@pytest.mark.parametrize("style", STYLES)
def test_the_bytes_alive_after_a_step_are_those_before_it(style):
    timeline = TrainingStep(*question({"style": style})).timeline()
    instants = every_instant(timeline, 5)
    assert instants[-1] == instants[0] == sum(rounded(b, 5, 1) for b in timeline.resident)

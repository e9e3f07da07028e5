"""The simulated caching allocator: each rule by hand, then all of them in any order of calls."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_questions import question

from snugpt.estimate.allocator import Block, CachingAllocator, simulate
from snugpt.estimate.generation import generation_timeline
from snugpt.estimate.operations import Buffer
from snugpt.estimate.timeline import Event, Placed, Segment, Timeline
from snugpt.estimate.training import TrainingStep
from snugpt.spec.recipe import GenerationRecipe
from snugpt.units import KIB, MIB

careful = settings(deadline=None, derandomize=True)


def reserved_for(*sizes: int) -> int:
    allocator = CachingAllocator()
    for size in sizes:
        allocator.allocate(size)
    return allocator.reserved


@pytest.mark.parametrize(
    ("size", "allocated"),
    [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512), (3 * MIB, 3 * MIB)],
)
def test_requests_are_rounded_up_to_512_bytes(size: int, allocated: int) -> None:
    allocator = CachingAllocator()
    assert allocator.allocate(size).size == allocated
    assert allocator.allocated == allocated


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (12 * MIB, 12 * MIB),
        (33 * MIB + 5, 34 * MIB),
    ],
)
def test_a_segment_is_2_or_20_mib_or_the_request_rounded_up_to_2_mib(size, segment) -> None:
    assert reserved_for(size) == segment


def test_small_requests_share_a_segment_until_it_is_full() -> None:
    assert reserved_for(MIB, MIB) == 2 * MIB
    assert reserved_for(MIB, MIB, 512) == 4 * MIB
    assert reserved_for(*[512] * 4096) == 2 * MIB
    assert reserved_for(*[512] * 4097) == 4 * MIB


def test_small_and_large_requests_never_share_a_segment() -> None:
    assert reserved_for(512, 2 * MIB) == 22 * MIB
    assert reserved_for(2 * MIB, 512) == 22 * MIB


@pytest.mark.parametrize(("rest", "allocated"), [(MIB, 12 * MIB), (MIB + 512, 11 * MIB - 512)])
def test_a_large_block_is_split_only_if_more_than_a_mib_is_left(rest, allocated) -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(12 * MIB))
    block = allocator.allocate(12 * MIB - rest)
    assert block.size == allocated == allocator.allocated
    assert allocator.reserved == 12 * MIB


def test_a_small_block_is_split_to_the_last_512_bytes() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(MIB) for _ in range(2)]
    allocator.release(blocks[0])
    assert allocator.allocate(MIB - 512).size == MIB - 512
    assert allocator.allocate(512).size == 512
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 2 * MIB)


def held(allocator: CachingAllocator, *sizes: int) -> list[Block]:
    return [allocator.allocate(size) for size in sizes]


def test_the_smallest_free_block_that_holds_a_request_is_taken() -> None:
    allocator = CachingAllocator()
    large, small, middle = held(allocator, 40 * MIB, 12 * MIB, 20 * MIB)
    addresses = {block.address: block.size // MIB for block in (large, small, middle)}
    for block in (large, small, middle):
        allocator.release(block)
    assert addresses[allocator.allocate(12 * MIB).address] == 12
    assert addresses[allocator.allocate(12 * MIB).address] == 20
    assert addresses[allocator.allocate(30 * MIB).address] == 40


def test_of_equal_free_blocks_the_lowest_is_taken() -> None:
    allocator = CachingAllocator()
    blocks = held(allocator, *[12 * MIB] * 3)
    for block in reversed(blocks):
        allocator.release(block)
    assert allocator.allocate(12 * MIB).address == min(block.address for block in blocks)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_free_neighbours_become_one_block_in_any_order(order: tuple[int, ...]) -> None:
    allocator = CachingAllocator()
    blocks = held(allocator, 6 * MIB, 6 * MIB, 8 * MIB)
    assert allocator.reserved == 20 * MIB
    for index in order:
        allocator.release(blocks[index])
    assert allocator.allocated == 0
    assert allocator.allocate(20 * MIB).size == 20 * MIB
    assert allocator.reserved == 20 * MIB


def test_blocks_of_two_segments_never_become_one() -> None:
    allocator = CachingAllocator()
    for block in held(allocator, 20 * MIB, 20 * MIB):
        allocator.release(block)
    allocator.allocate(30 * MIB)
    assert allocator.reserved == 70 * MIB


def test_a_block_in_use_keeps_its_neighbours_apart() -> None:
    allocator = CachingAllocator()
    blocks = held(allocator, 8 * MIB, 4 * MIB, 8 * MIB)
    allocator.release(blocks[0])
    allocator.release(blocks[2])
    allocator.allocate(9 * MIB)
    assert allocator.reserved == 40 * MIB


def test_segments_are_kept_and_used_again() -> None:
    allocator = CachingAllocator()
    for _ in range(5):
        block = allocator.allocate(50 * MIB)
        allocator.release(block)
    assert (allocator.reserved, allocator.allocated) == (50 * MIB, 0)
    assert allocator.peak_allocated == 50 * MIB


sizes = st.one_of(st.integers(1, 4 * KIB), st.integers(1, 2 * MIB), st.integers(1, 60 * MIB))


@careful
@given(st.lists(st.one_of(sizes, st.integers(-20, -1)), max_size=120))
def test_whatever_is_asked_blocks_never_overlap_and_counters_agree(calls: list[int]) -> None:
    allocator, live = CachingAllocator(), []
    for call in calls:
        if call > 0:
            live.append((call, allocator.allocate(call)))
        elif live:
            allocator.release(live.pop(-call % len(live))[1])
        check(allocator, live)
    for _, block in live:
        allocator.release(block)
    assert allocator.allocated == 0
    assert sum(block.size for _, _, block in free_blocks(allocator)) == allocator.reserved
    assert all(b.before is b.after is None for _, _, b in free_blocks(allocator))  # whole segments


def free_blocks(allocator: CachingAllocator) -> list[tuple[int, int, Block]]:
    return allocator._free[True] + allocator._free[False]


def check(allocator: CachingAllocator, live: list[tuple[int, Block]]) -> None:
    requested = sum(size for size, _ in live)
    assert requested <= allocator.allocated == sum(block.size for _, block in live)
    assert allocator.allocated <= allocator.peak_allocated <= allocator.peak_reserved
    assert allocator.allocated <= allocator.reserved == allocator.peak_reserved
    blocks = [block for _, block in live] + [block for _, _, block in free_blocks(allocator)]
    ends = sorted((block.address, block.address + block.size) for block in blocks)
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert sum(end - start for start, end in ends) == allocator.reserved
    for size, address, block in free_blocks(allocator):
        assert block.free
        assert (size, address) == (block.size, block.address)
    assert all(not block.free and block.size >= size for size, block in live)


class Watched(CachingAllocator):
    """Keeps what is allocated at the end of a simulation."""

    last: CachingAllocator

    def __init__(self) -> None:
        super().__init__()
        Watched.last = self


def timelines() -> dict[str, tuple[Timeline, int]]:
    found = {}
    for style, runtime in (("nanochat", "flash"), ("llama", "efficient"), ("gpt2", "flash")):
        for levers in ({}, {"checkpoint": "blocks", "accumulation": 8}, {"loss": "plain"}):
            shape, recipe, run = question(
                {"style": style, "runtime": runtime, "depth": 4, "seq_len": 512} | levers
            )
            timeline = TrainingStep(shape, recipe, run).timeline()
            found[f"{style} {runtime} {levers}"] = timeline, 6
        answer = GenerationRecipe(
            batch=3, prompt_tokens=300, max_new_tokens=90, kv_dtype="bf16", weight_dtype="bf16"
        )
        found[f"{style} generates"] = generation_timeline(shape, answer, run), 3
    return found


@pytest.mark.parametrize("name", timelines())
def test_a_step_of_a_model_ends_with_what_is_resident(name: str, monkeypatch) -> None:
    monkeypatch.setattr("snugpt.estimate.allocator.CachingAllocator", Watched)
    timeline, batch = timelines()[name]
    peaks = simulate(timeline, batch)
    left = Watched.last
    resident = sum(timeline.bytes_of(buffer, batch) for buffer in timeline.resident)
    kept = sum(  # the masks that a prompt leaves behind
        sign * timeline.bytes_of(buffer, batch) for _, _, (sign, buffer) in timeline.events()
    )
    assert resident <= left.allocated
    slack = left.allocated - resident - 2 * kept
    assert 0 <= slack <= MIB * len(timeline.resident)
    alive, _ = timeline.read(batch)
    assert alive.bytes <= peaks.allocated_bytes <= peaks.reserved_bytes


def test_optimizer_state_falls_into_the_holes_of_the_first_step() -> None:
    """By hand: 12 MiB of activations are free when 5 MiB of optimizer state come."""
    activations = Buffer("activations", "activations", 12 * MIB, 0, "")
    state = Buffer("state", "optimizer", 5 * MIB, 0, "")
    forward = Segment([Event(1, activations), Event(-1, activations)], 512)
    placed = (Placed("forward", 0, forward), Placed("optimizer", -1, Segment([], 512)))
    nothing = Segment([Event(1, state), Event(-1, state)], 512)
    peaks = simulate(Timeline((state,), (*placed, Placed("optimizer", -1, nothing)), 512), 1)
    # 5 MiB of the segment of 12 hold the state; a second copy of it fits into the rest of 7; then
    # the 12 MiB of the second step need a segment of their own.
    assert peaks.allocated_bytes == 17 * MIB
    assert peaks.reserved_bytes == 24 * MIB


def test_random_orders_leave_no_free_block_unused_that_holds_the_request() -> None:
    chance, allocator, live = random.Random(1), CachingAllocator(), []
    for _ in range(3000):
        if live and chance.random() < 0.5:
            allocator.release(live.pop(chance.randrange(len(live))))
            continue
        size = chance.choice((600, 70 * KIB, 3 * MIB, 15 * MIB))
        fits = [
            b for _, _, b in free_blocks(allocator) if b.size >= size and b.small == (size <= MIB)
        ]
        before = allocator.reserved
        live.append(allocator.allocate(size))
        assert (allocator.reserved == before) is bool(fits)

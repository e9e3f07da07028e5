"""The simulated caching allocator: each rule by hand, then all of them in any order of calls."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_questions import question

from naive_allocator import NaiveAllocator
from snugpt.estimate.allocator import CachingAllocator, OutOfMemoryError
from snugpt.estimate.blocks import Block
from snugpt.estimate.expandable import ExpandableAllocator
from snugpt.estimate.generation import generation_timeline
from snugpt.estimate.operations import Buffer
from snugpt.estimate.simulation import simulate
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
streams = st.integers(0, 2)
calls = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), sizes, streams),
        st.tuples(st.just("allocate"), sizes, streams),
        st.tuples(st.just("release"), st.integers(0, 60), streams),
        st.tuples(st.just("release"), st.integers(0, 60), streams),
        st.tuples(st.just("record"), st.integers(0, 60), streams),
        st.tuples(st.just("caught up"), st.just(0), streams),
        st.tuples(st.sampled_from(["caught up", "empty cache"]), st.just(0), streams),
    ),
    max_size=60,
)
KINDS = [CachingAllocator, ExpandableAllocator]


@pytest.mark.parametrize("kind", KINDS)
@settings(careful, max_examples=200)
@given(calls, st.one_of(st.none(), st.integers(2 * MIB, 300 * MIB)))
def test_any_order_of_calls_comes_to_the_same_as_the_naive_allocator(kind, calls, capacity) -> None:
    play_both(kind, capacity, calls)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_long_orders_with_little_memory_come_to_the_same_too(kind, seed: int) -> None:
    chance = random.Random(seed)
    sizes = (4 * KIB, 2 * MIB, 12 * MIB, 60 * MIB)
    calls = [
        (
            chance.choices(["allocate", "release", "record", "caught up", "empty cache"],
                           [50, 40, 8, 5, 1])[0],
            chance.randrange(1, chance.choice(sizes)),
            chance.choice((0, 0, 0, 1)),
        )
        for _ in range(400)
    ]  # fmt: skip
    retries, _ = play_both(kind, 150 * MIB, calls)
    assert retries


def play_both(kind, capacity: int | None, calls: list[tuple[str, int, int]]) -> tuple[int, int]:
    """Play calls on both; return the retries and how often memory ran out."""
    allocator = kind(capacity)
    naive = NaiveAllocator(expandable=kind is ExpandableAllocator, capacity_bytes=capacity)
    live: list[Block] = []
    for call, number, stream in calls:
        if call == "allocate":
            expected = naive.allocate(number, stream)
            try:
                live.append(allocator.allocate(number, stream))
                assert live[-1].address == expected
            except OutOfMemoryError:
                assert expected is None
        elif call == "caught up":
            naive.caught_up(stream)
            allocator.process_events([stream])
        elif call == "empty cache":
            naive.give_back_cached()
            allocator.release_cached()
        elif live and call == "record":
            naive.record_stream(live[number % len(live)].address, stream)
            allocator.record_stream(live[number % len(live)], stream)
        elif live and call == "release":
            block = live.pop(number % len(live))
            naive.release(block.address)
            allocator.release(block)
        assert (allocator.allocated, allocator.waiting) == (naive.allocated, naive.waiting)
        assert allocator.reserved == naive.reserved
        assert (allocator.alloc_retries, allocator.ooms) == (naive.retries, naive.ooms)
        check(allocator, live)
    for block in live:
        allocator.release(block)
    allocator.release_cached()
    assert (allocator.allocated, allocator.waiting, allocator.reserved) == (0, 0, 0)
    assert not list(allocator.free_blocks())
    return allocator.alloc_retries, allocator.ooms


def check(allocator: CachingAllocator, live: list[Block]) -> None:
    """Nothing overlaps, nothing is lost, what is free is merged, pools hold what they say."""
    free = list(allocator.free_blocks())
    free_bytes = sum(block.size for block in free)
    assert allocator.allocated == sum(block.size for block in live)
    assert allocator.allocated + allocator.waiting + free_bytes == allocator.reserved
    assert allocator.allocated <= allocator.peak_allocated <= allocator.peak_reserved
    ends = sorted((block.address, block.address + block.size) for block in [*live, *free])
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    for block in free:
        assert block.free
        assert block.mapped
        for beside in (block.before, block.after):
            assert beside is None or not beside.free
        assert block.before is None or block.before.after is block
        assert block.after is None or block.after.before is block
        assert block.after is None or block.address + block.size == block.after.address
    assert not any(block.free for block in live)
    for key, pool in allocator.pools.items():
        assert key == pool.key
        assert pool.free == sorted(pool.free)
        assert all(entry == (entry[2].size, entry[2].address, entry[2]) for entry in pool.free)


def test_a_block_used_on_another_stream_waits_for_it() -> None:
    allocator = CachingAllocator()
    block = allocator.allocate(20 * MIB)
    allocator.record_stream(block, 0)  # its own stream: nothing to wait for
    allocator.record_stream(block, 1)
    allocator.record_stream(block, 2)
    allocator.release(block)
    assert (allocator.allocated, allocator.waiting) == (0, 20 * MIB)
    allocator.allocate(20 * MIB)
    assert allocator.reserved == 40 * MIB
    allocator.process_events([1])
    assert allocator.waiting == 20 * MIB
    allocator.process_events([2])
    assert allocator.waiting == 0
    allocator.allocate(20 * MIB)
    assert allocator.reserved == 40 * MIB


def test_streams_and_private_pools_share_nothing() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(20 * MIB))
    allocator.release(allocator.allocate(20 * MIB, stream=7))
    allocator.release(allocator.allocate(20 * MIB, owner=(0, 1)))
    assert allocator.reserved == 60 * MIB
    assert allocator.release_cached() == 40 * MIB  # a graph that lives keeps its pool


@pytest.mark.parametrize("kind", KINDS)
def test_cached_memory_goes_back_when_there_is_no_more(kind) -> None:
    allocator = kind(64 * MIB)
    for block in held(allocator, 20 * MIB, 40 * MIB):
        allocator.release(block)
    if kind is CachingAllocator:
        assert allocator.allocate(60 * MIB).size == 60 * MIB  # 20 and 40 lie apart
        assert allocator.alloc_retries == 1
    else:
        assert allocator.allocate(60 * MIB).size == 60 * MIB  # they lie side by side
        assert allocator.alloc_retries == 0
    with pytest.raises(OutOfMemoryError) as caught:
        allocator.allocate(6 * MIB)
    assert caught.value.size == 6 * MIB
    assert (allocator.ooms, allocator.allocated, allocator.reserved) == (1, 60 * MIB, 60 * MIB)


def test_a_segment_with_anything_alive_in_it_does_not_go_back() -> None:
    allocator = CachingAllocator()
    keep, go = held(allocator, 5 * MIB, 5 * MIB)
    allocator.release(go)
    assert allocator.release_cached() == 0
    allocator.release(keep)
    assert allocator.release_cached() == 20 * MIB


def test_blocks_above_the_split_limit_stay_whole() -> None:
    allocator = CachingAllocator(max_split_bytes=30 * MIB)
    allocator.release(allocator.allocate(60 * MIB))
    allocator.allocate(10 * MIB)  # a small request may not have it
    assert allocator.reserved == 70 * MIB
    allocator.allocate(32 * MIB)  # nor one that leaves 20 MiB or more
    assert allocator.reserved == 102 * MIB
    assert allocator.allocate(41 * MIB).size == 60 * MIB
    assert allocator.reserved == 102 * MIB


def test_without_room_blocks_above_the_split_limit_go_back_first() -> None:
    allocator = CachingAllocator(100 * MIB, max_split_bytes=30 * MIB)
    small, large = held(allocator, 20 * MIB, 70 * MIB)
    allocator.release(small)
    allocator.release(large)
    allocator.allocate(40 * MIB)
    assert (allocator.reserved, allocator.alloc_retries) == (60 * MIB, 0)  # the 20 MiB stay cached
    allocator = CachingAllocator(110 * MIB, max_split_bytes=30 * MIB)
    _, large = held(allocator, 60 * MIB, 40 * MIB)
    allocator.release(large)
    allocator.allocate(45 * MIB)  # 40 MiB of such blocks are not enough: all of the cache goes
    assert (allocator.reserved, allocator.alloc_retries) == (106 * MIB, 1)


def test_expandable_pages_are_2_or_20_mib_and_split_at_512_bytes() -> None:
    allocator = ExpandableAllocator()
    first = allocator.allocate(12 * MIB)
    assert (first.size, allocator.reserved) == (12 * MIB, 20 * MIB)
    second = allocator.allocate(8 * MIB - 512)  # the native allocator would leave no such rest
    assert (second.address, allocator.reserved) == (first.address + 12 * MIB, 20 * MIB)
    third = allocator.allocate(25 * MIB)  # grows from the 512 bytes that were left
    assert (third.address, allocator.reserved) == (second.address + second.size, 60 * MIB)
    allocator.allocate(MIB)
    assert allocator.reserved == 62 * MIB


def test_an_expandable_segment_grows_where_segments_would_lie_apart() -> None:
    """Each request a little larger than the last: the case expandable segments were made for."""
    native, expandable = CachingAllocator(), ExpandableAllocator()
    for allocator in (native, expandable):
        for size in range(20 * MIB, 60 * MIB, 4 * MIB):
            allocator.release(allocator.allocate(size))
    assert native.reserved == sum(range(20 * MIB, 60 * MIB, 4 * MIB))
    assert expandable.reserved == 60 * MIB


def test_a_hole_that_was_unmapped_is_filled_before_the_end_grows() -> None:
    allocator = ExpandableAllocator()
    first, hole, last = held(allocator, 20 * MIB, 60 * MIB, 20 * MIB)
    address = hole.address
    allocator.release(hole)
    assert allocator.release_cached() == 60 * MIB
    assert allocator.allocate(30 * MIB).address == address
    assert allocator.reserved == 80 * MIB
    allocator.release(first)
    allocator.release(last)
    assert allocator.release_cached() == 40 * MIB


def test_only_pages_free_from_end_to_end_are_unmapped() -> None:
    allocator = ExpandableAllocator()
    left, free, right = held(allocator, 10 * MIB, 50 * MIB, 20 * MIB)
    allocator.release(free)
    assert allocator.release_cached() == 40 * MIB  # 10 MiB of the first page stay
    assert allocator.allocated + sum(b.size for b in allocator.free_blocks()) == 40 * MIB
    assert allocator.allocate(10 * MIB).address == left.address + 10 * MIB
    assert right.address == left.address + 60 * MIB


class Watched(CachingAllocator):
    """Keeps what is allocated at the end of a simulation."""

    last: CachingAllocator

    def __init__(self, capacity_bytes: int | None = None) -> None:
        super().__init__(capacity_bytes)
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
    monkeypatch.setattr("snugpt.estimate.simulation.CachingAllocator", Watched)
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
    expandable = simulate(timeline, batch, expandable=True)
    assert expandable.allocated_bytes == alive.bytes + 2 * kept  # every block is split: no slack
    assert expandable.allocated_bytes <= expandable.reserved_bytes


def test_with_less_memory_a_step_gives_the_cache_back_and_then_runs_out() -> None:
    timeline, batch = timelines()["nanochat flash {}"]
    whole = simulate(timeline, batch)
    assert (whole.alloc_retries, whole.out_of_memory) == (0, False)
    assert simulate(timeline, batch, capacity_bytes=whole.reserved_bytes) == whole
    for expandable in (False, True):
        tight = simulate(
            timeline, batch, expandable=expandable, capacity_bytes=whole.allocated_bytes - MIB
        )
        assert tight.out_of_memory
        assert tight.reserved_bytes < whole.allocated_bytes
        assert tight.alloc_retries >= 1


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

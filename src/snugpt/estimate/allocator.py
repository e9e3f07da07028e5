"""PyTorch's CUDA caching allocator, simulated: its default, without expandable segments.

Rules and constants from c10/core/AllocatorConfig.h (PyTorch 2.13) and from DeviceCachingAllocator
in c10/cuda/CUDACachingAllocator.cpp; the function that says each rule is named behind it:

- a request is rounded up to 512 bytes; up to 1 MiB the small pool serves it, else the large one;
  each stream has pools of its own, and so has each private pool (`round_size`, `get_pool`);
- a pool is searched for the smallest free block that holds it, lowest address first
  (`get_free_block`);
- failing that a segment is taken from the driver: 2 MiB for small requests, 20 MiB for those below
  10 MiB, else the request rounded up to 2 MiB (`get_allocation_size`, `alloc_block`);
- a block is split if at least 512 bytes (small pool) or more than 1 MiB (large pool) would be left
  (`should_split`); from `max_split_size` up, which is infinite by default, blocks stay whole and
  serve only requests that leave less than 20 MiB of them;
- a freed block is merged with its free neighbours (`free_block`, `try_merge_blocks`). One that was
  used on other streams waits for their events first (`insert_events`, `process_events`);
- segments are kept until the driver has no more. Then every segment that is free from end to end
  goes back, and the request is tried once more (`release_cached_blocks`, `malloc`).

The unsplit rest of a block is counted as allocated (slack), as PyTorch counts it. Garbage
collection, rounding to parts of powers of two and limits by memory fraction, all off by default,
are not simulated. Never compared with a GPU yet; `estimate/replay.py` is how it will be.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from snugpt.estimate.blocks import DEFAULT_OWNER, Block, Owner, Pool, PoolKey, Stretch
from snugpt.units import MIB

SMALL_REQUEST = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_REQUEST = 10 * MIB
LARGE_SEGMENT = 20 * MIB
ROUND_SEGMENT = 2 * MIB
MIN_BLOCK = 512
OVERSIZE_REST = 20 * MIB  # max_non_split_rounding_size


class OutOfMemoryError(Exception):
    """The capacity is spent and nothing is left to give back; `size` bytes were asked for."""

    def __init__(self, size: int) -> None:
        super().__init__(f"no room for {size} bytes")
        self.size = size


class CachingAllocator:
    """Allocates and frees by PyTorch's rules; `allocated`, `reserved` and their peaks in bytes.

    `capacity_bytes` is what the driver can hand out, None for no end. `place` says where a new
    segment of so many bytes lies; without it segments lie far apart, in the order they came.
    """

    def __init__(
        self,
        capacity_bytes: int | None = None,
        *,
        max_split_bytes: int | None = None,
        place: Callable[[PoolKey, int], int] | None = None,
    ) -> None:
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.waiting = 0  # bytes of blocks that were freed and wait for other streams
        self.alloc_retries = self.ooms = 0
        self.pools: dict[tuple[bool, int, Owner], Pool] = {}
        self._capacity, self._max_split = capacity_bytes, max_split_bytes
        self._place, self._num_segments = place or self._far_apart, 0
        self._uses: dict[Block, set[int]] = {}
        self._events: dict[int, list[Block]] = {}  # stream: blocks whose last use it is to reach
        self._num_events: dict[Block, int] = {}

    def allocate(self, num_bytes: int, stream: int = 0, owner: Owner = DEFAULT_OWNER) -> Block:
        """Return a block that holds `num_bytes`, above 0. Raises `OutOfMemoryError`."""
        size = -(-num_bytes // MIN_BLOCK) * MIN_BLOCK
        key = size <= SMALL_REQUEST, stream, owner
        pool = self.pools.get(key)
        if pool is None:
            pool = self.pools[key] = Pool(PoolKey(*key))
        block = self._best_fit(size, pool)
        if block is None:
            block = self._new_memory(size, pool)
        return self._hand_out(block, size)

    def allocate_new(self, num_bytes: int, stream: int = 0, owner: Owner = DEFAULT_OWNER) -> Block:
        """Return a block of new memory, whatever is free: what PyTorch does once it gave the cache
        back, even if a block that waited for a stream would serve by then."""
        size = -(-num_bytes // MIN_BLOCK) * MIN_BLOCK
        key = PoolKey(size <= SMALL_REQUEST, stream, owner)
        return self._hand_out(self._new_memory(size, self.pools.setdefault(key, Pool(key))), size)

    def release(self, block: Block) -> None:
        """Free a block; it can be used again at once, or when the streams that used it are done."""
        if self._uses:
            streams = self._uses.pop(block, None)
            if streams:
                self.request_free(block)
                self._num_events[block] = len(streams)
                for stream in streams:
                    self._events.setdefault(stream, []).append(block)
                return
        self.allocated -= block.size
        self._give_back(block)

    def record_stream(self, block: Block, stream: int) -> None:
        """Note that another stream uses a block (`recordStream`); its own stream says nothing."""
        if stream != block.pool.key.stream:
            self._uses.setdefault(block, set()).add(stream)

    def process_events(self, streams: Iterable[int] | None = None) -> None:
        """These streams (None: all) have caught up: blocks that wait for no other are free.

        PyTorch asks the driver before each allocation. A simulation has no clock, so the caller
        says when.
        """
        for stream in list(self._events if streams is None else streams):
            for block in self._events.pop(stream, ()):
                self._num_events[block] -= 1
                if not self._num_events[block]:
                    del self._num_events[block]
                    self.complete_free(block)

    def request_free(self, block: Block) -> None:
        """The first half of a free: no longer allocated, not yet to be used again."""
        self.allocated -= block.size
        self.waiting += block.size

    def complete_free(self, block: Block) -> None:
        """The second half of a free."""
        self.waiting -= block.size
        self._give_back(block)

    def release_cached(self) -> int:
        """Give free memory back to the driver (`torch.cuda.empty_cache`); return its bytes.

        All streams are waited for. Private pools keep theirs: their graphs are alive.
        """
        self.process_events()
        before = self.reserved
        for pool in sorted(self.pools.values(), key=lambda pool: pool.small):
            if pool.key.owner == DEFAULT_OWNER:
                self._return_memory(pool)
        return before - self.reserved

    def adopt(
        self, key: PoolKey, segments: Iterable[Stretch], used: Iterable[Stretch]
    ) -> list[Block]:
        """Start with memory that is there already: segments, and the blocks in use within them.

        Both in order of address. Returns the used blocks. What lies between them is free.
        """
        pool = self.pools.setdefault(key, Pool(key))
        taken, found = list(used), []
        for address, size in segments:
            self._count_new(size)
            first, last = bisect_left(taken, (address,)), bisect_left(taken, (address + size,))
            blocks = self._tile(pool, address, size, taken[first:last])
            found += [block for block in blocks if not block.free]
        return found

    def free_blocks(self) -> Iterator[Block]:
        """Every block that memory stands behind and nobody uses."""
        return (block for pool in self.pools.values() for _, _, block in pool.free)

    def _hand_out(self, block: Block, size: int) -> Block:
        if self._splits(block, size):
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def _best_fit(self, size: int, pool: Pool) -> Block | None:
        index = bisect_left(pool.free, (size,))
        if index == len(pool.free):
            return None
        limit = self._max_split
        if limit is not None:
            found = pool.free[index][0]
            if found >= (limit if size < limit else size + OVERSIZE_REST):
                return None
        return pool.free.pop(index)[2]

    def _splits(self, block: Block, size: int) -> bool:
        rest = block.size - size
        if block.pool.small:
            return rest >= MIN_BLOCK
        return rest > SMALL_REQUEST and (self._max_split is None or size < self._max_split)

    def _new_memory(self, size: int, pool: Pool) -> Block:
        """Take memory from the driver, if need be after what is cached went back to it."""
        block = self._grow(size, pool)
        if block is None and self._return_oversize(size, pool):
            block = self._grow(size, pool)
        if block is None:
            self.release_cached()
            self.alloc_retries += 1
            block = self._grow(size, pool)
        if block is None:
            self.ooms += 1
            raise OutOfMemoryError(size)
        return block

    def _grow(self, size: int, pool: Pool) -> Block | None:
        if pool.small:
            total = SMALL_SEGMENT
        elif size < LARGE_REQUEST:
            total = LARGE_SEGMENT
        else:
            total = -(-size // ROUND_SEGMENT) * ROUND_SEGMENT
        if self._capacity is not None and self.reserved + total > self._capacity:
            return None
        self._count_new(total)
        return Block(self._place(pool.key, total), total, pool)

    def _return_memory(self, pool: Pool) -> None:
        """Give a pool's whole segments back."""
        for entry in list(pool.free):
            if entry[2].before is entry[2].after is None:
                pool.free.remove(entry)
                self.reserved -= entry[0]

    def _return_oversize(self, size: int, pool: Pool) -> bool:
        """With a `max_split_size`: give back one block above it that would have held the request,
        or as many of the largest as hold it together (`release_available_cached_blocks`)."""
        limit = self._max_split
        if limit is None:
            return False
        wanted, given = max(size, limit), 0
        index = bisect_left(pool.free, (wanted,))
        if index < len(pool.free):
            self.reserved -= pool.free.pop(index)[0]
            return True
        while pool.free and given < wanted and pool.free[-1][0] >= limit:
            given += pool.free.pop()[0]
        self.reserved -= given
        return given >= wanted

    def _give_back(self, block: Block) -> None:
        """Merge a block with its free neighbours and put it into its pool."""
        block.free = True
        before, after = block.before, block.after
        if before is not None and before.free:
            self._forget(before)
            block.address, block.size = before.address, block.size + before.size
            block.before = before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.free:
            self._forget(after)
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        insort(block.pool.free, (block.size, block.address, block))

    def _split(self, block: Block, size: int) -> None:
        pool = block.pool
        rest = Block(block.address + size, block.size - size, pool, True, block, block.after)
        if rest.after is not None:
            rest.after.before = rest
        block.after, block.size = rest, size
        insort(pool.free, (rest.size, rest.address, rest))

    def _forget(self, block: Block) -> None:
        free = block.pool.free
        del free[bisect_left(free, (block.size, block.address))]

    def _tile(self, pool: Pool, address: int, size: int, used: list[Stretch]) -> list[Block]:
        """Cut one stretch of memory into used and free blocks, in order of address."""
        blocks: list[Block] = []
        at = address
        for start, length in [*used, (address + size, 0)]:
            if start > at:
                blocks.append(Block(at, start - at, pool, free=True))
            if length:
                blocks.append(Block(start, length, pool))
                self.allocated += length
            at = start + length
        for before, after in pairwise(blocks):
            before.after, after.before = after, before
        for block in blocks:
            if block.free:
                insort(pool.free, (block.size, block.address, block))
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return blocks

    def _count_new(self, num_bytes: int) -> None:
        self.reserved += num_bytes
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved

    def _far_apart(self, key: PoolKey, num_bytes: int) -> int:
        self._num_segments += 1
        return self._num_segments << 48

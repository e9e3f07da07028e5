"""The caching allocator with expandable segments (`expandable_segments:True`).

One range of addresses per pool, far larger than the card, gets memory page by page: 2 MiB in the
small pool, 20 MiB in the large one. Rules from class ExpandableSegment and the functions named, all
in c10/cuda/CUDACachingAllocator.cpp:

- a free block is sought as ever; but one that could grow, because addresses without memory follow,
  counts with them, and a later block that comes to less is preferred (`get_free_block`);
- failing that, the lowest addresses are sought at which free blocks and addresses without memory
  are long enough together; pages are mapped there (`find_expandable_block`, `map_block`,
  `try_allocate_expandable_block`). Holes that were unmapped are so filled before the end grows;
- a block is split if 512 bytes are left, in both pools (`should_split`);
- when memory runs out every page that is free from end to end is unmapped (`unmap_block`,
  `release_blocks`).

Reserved is what is mapped. PyTorch's range is 9/8 of the card; here it is 16 TiB, more
than any card and any request. Never compared with a GPU yet.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from itertools import pairwise

from snugpt.estimate.allocator import (
    LARGE_SEGMENT,
    MIN_BLOCK,
    SMALL_SEGMENT,
    CachingAllocator,
)
from snugpt.estimate.blocks import Block, Pool, PoolKey, Stretch

RANGE_BYTES = 2**44 // LARGE_SEGMENT * LARGE_SEGMENT


class ExpandableAllocator(CachingAllocator):
    """The same interface by the rules of expandable segments."""

    def adopt(
        self, key: PoolKey, segments: Iterable[Stretch], used: Iterable[Stretch]
    ) -> list[Block]:
        """Start with pages that are mapped already, all of one range; see the base class."""
        pool = self.pools.setdefault(key, Pool(key))
        taken, mapped = list(used), list(segments)
        if not mapped:
            return []
        base = self._place(key, RANGE_BYTES)
        chain: list[Block] = []
        at = base
        for address, size in [*mapped, (base + RANGE_BYTES, 0)]:
            if address > at:
                chain.append(Block(at, address - at, pool, mapped=False))
                insort(pool.unmapped, (at, chain[-1]))
            if size:
                self._count_new(size)
                first, last = bisect_left(taken, (address,)), bisect_left(taken, (address + size,))
                chain += self._tile(pool, address, size, taken[first:last])
            at = address + size
        for before, after in pairwise(chain):
            before.after, after.before = after, before
        return [block for block in chain if block.mapped and not block.free]

    def _best_fit(self, size: int, pool: Pool) -> Block | None:
        free = pool.free
        index = bisect_left(free, (size,))
        if index == len(free):
            return None
        while (
            index + 1 < len(free)
            and free[index][2].after is not None
            and _grown(free[index + 1][2]) < _grown(free[index][2])
        ):
            index += 1
        return free.pop(index)[2]

    def _splits(self, block: Block, size: int) -> bool:
        return block.size - size >= MIN_BLOCK

    def _grow(self, size: int, pool: Pool) -> Block | None:
        if size > RANGE_BYTES:
            return None
        block = self._lowest_room(size, pool)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            after = block.after
            assert after is not None  # what has room goes on, or it would not have been chosen
            if not self._map(after, min(after.size, size - block.size)):
                return None
            block = after  # it has swallowed the block before it
        self._forget(block)
        return block

    def _lowest_room(self, size: int, pool: Pool) -> Block:
        """The first of a row of free and unmapped blocks that come to `size`."""
        for _, unmapped in pool.unmapped:
            first = unmapped
            if first.before is not None and first.before.free:
                first = first.before
            room, block = 0, first
            while room < size and (block.free or not block.mapped):
                room += block.size
                if block.after is None:
                    break
                block = block.after
            if room >= size:
                return first
        address = self._place(pool.key, RANGE_BYTES)
        block = Block(address, RANGE_BYTES, pool, mapped=False)
        insort(pool.unmapped, (address, block))
        return block

    def _map(self, block: Block, size: int) -> bool:
        """Put pages behind the first `size` bytes of an unmapped block, and free them."""
        page = SMALL_SEGMENT if block.pool.small else LARGE_SEGMENT
        num_bytes = -(-size // page) * page
        if self._capacity is not None and self.reserved + num_bytes > self._capacity:
            return False
        pool = block.pool
        _forget_unmapped(block)
        if num_bytes < block.size:
            rest = Block(block.address + num_bytes, block.size - num_bytes, pool, mapped=False)
            _link(block, rest)
            insort(pool.unmapped, (rest.address, rest))
            block.size = num_bytes
        block.mapped = True
        self._count_new(num_bytes)
        self._give_back(block)
        return True

    def _return_memory(self, pool: Pool) -> None:
        for _, _, block in list(pool.free):
            self._unmap(block)

    def _unmap(self, block: Block) -> None:
        """Take the pages from a free block that it covers from end to end."""
        pool = block.pool
        page = SMALL_SEGMENT if pool.small else LARGE_SEGMENT
        base = _first(block).address
        start = base + -(-(block.address - base) // page) * page
        end = base + (block.address + block.size - base) // page * page
        if start >= end:
            return
        self._forget(block)
        if start > block.address:
            left = Block(block.address, start - block.address, pool, free=True)
            if block.before is not None:
                _link(block.before, left, only=True)
            _link(left, block, only=True)
            insort(pool.free, (left.size, left.address, left))
        if end < block.address + block.size:
            right = Block(end, block.address + block.size - end, pool, free=True)
            _link(block, right)
            insort(pool.free, (right.size, right.address, right))
        block.address, block.size = start, end - start
        block.free = block.mapped = False
        self.reserved -= block.size
        _merge_unmapped(block)
        if block.before is not None or block.after is not None:
            insort(pool.unmapped, (block.address, block))


def _grown(block: Block) -> int:
    """The bytes of a free block with the addresses without memory behind it."""
    after = block.after
    return block.size if after is None or after.mapped else block.size + after.size


def _first(block: Block) -> Block:
    """The first block of a range. Address ranges begin at a page, and so their blocks' offsets."""
    while block.before is not None:
        block = block.before
    return block


def _link(before: Block, after: Block, *, only: bool = False) -> None:
    """Put `after` behind `before`; unless `only`, what came there follows it."""
    if not only:
        after.after = before.after
        if after.after is not None:
            after.after.before = after
    before.after, after.before = after, before


def _forget_unmapped(block: Block) -> None:
    unmapped = block.pool.unmapped
    del unmapped[bisect_left(unmapped, (block.address,))]


def _merge_unmapped(block: Block) -> None:
    """Swallow neighbours without memory."""
    before, after = block.before, block.after
    if before is not None and not before.mapped:
        _forget_unmapped(before)
        block.address, block.size = before.address, block.size + before.size
        block.before = before.before
        if block.before is not None:
            block.before.after = block
    if after is not None and not after.mapped:
        _forget_unmapped(after)
        block.size += after.size
        block.after = after.after
        if block.after is not None:
            block.after.before = block

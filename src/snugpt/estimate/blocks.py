"""What memory of the simulated allocator is cut into: blocks, and the pools that hold free ones."""

from __future__ import annotations

from typing import NamedTuple

Owner = tuple[int, int]  # id of a private pool (a CUDA graph's, say)
DEFAULT_OWNER: Owner = (0, 0)
Stretch = tuple[int, int]  # address and bytes


class PoolKey(NamedTuple):
    """What keeps blocks apart that must never serve each other's requests."""

    small: bool
    stream: int
    owner: Owner


class Pool:
    """The free blocks of one kind, smallest first; `unmapped` only where segments expand."""

    __slots__ = ("free", "key", "small", "unmapped")

    def __init__(self, key: PoolKey) -> None:
        self.key, self.small = key, key.small
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []


class Block:
    """A stretch of a segment; `before` and `after` are its neighbours in the segment.

    `free` is False for a block in use, for one that waits for other streams, and for address space
    without memory (`mapped` False).
    """

    __slots__ = ("address", "after", "before", "free", "mapped", "pool", "size")

    def __init__(
        self,
        address: int,
        size: int,
        pool: Pool,
        free: bool = False,
        before: Block | None = None,
        after: Block | None = None,
        mapped: bool = True,
    ) -> None:
        self.address, self.size, self.pool = address, size, pool
        self.free, self.before, self.after, self.mapped = free, before, after, mapped

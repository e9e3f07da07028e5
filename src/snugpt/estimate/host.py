"""Host memory of the lever `offload`: pinned slabs, and where in them each tensor lies.

PyTorch's pinned allocator rounds every request up to a power of two (CachingHostAllocator.h,
`roundSize`), which would waste up to half of a pinned buffer for each tensor. So slabs are asked
for that are powers of two already, and tensors are laid into them, first fit. The trainer lays its
tensors by this very class: what is predicted is what is pinned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from snugpt.estimate.timeline import Timeline
from snugpt.units import GIB, MIB, round_up

GPU_HOST_BYTES = int(2.5 * GIB)  # resident with CUDA's libraries loaded; assumed
SMALLEST_SLAB_BYTES, LARGEST_SLAB_BYTES = 2 * MIB, 256 * MIB
ALIGNMENT_BYTES = 512  # where a tensor may begin in a slab, as on the device


class Place(NamedTuple):
    """Where a tensor lies: which slab, and from which byte of it."""

    slab: int
    start: int


class Slabs:
    """Lays tensors into slabs. `sizes` are the slabs' bytes, each a power of two.

    A new slab doubles what there is, from 2 to 256 MiB; a larger tensor has one of its own size.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._filled: list[int] = []

    def place(self, num_bytes: int) -> Place:
        """Return a place for `num_bytes`, in the first slab with room."""
        needed = round_up(num_bytes, ALIGNMENT_BYTES)
        for slab, (size, filled) in enumerate(zip(self.sizes, self._filled, strict=True)):
            if size - filled >= needed:
                self._filled[slab] += needed
                return Place(slab, filled)
        usual = min(max(sum(self.sizes), SMALLEST_SLAB_BYTES), LARGEST_SLAB_BYTES)
        self.sizes.append(_power_of_two(max(usual, needed)))
        self._filled.append(needed)
        return Place(len(self.sizes) - 1, 0)


def slab_bytes(tensor_bytes: Iterable[int]) -> int:
    """The bytes of all slabs after tensors of these sizes were laid into them, in order."""
    slabs = Slabs()
    for num_bytes in tensor_bytes:
        slabs.place(num_bytes)
    return sum(slabs.sizes)


def host_bytes(timeline: Timeline, batch: int) -> int:
    """The host memory a step pins beside the process itself, at a batch size."""
    return slab_bytes(b.fixed_bytes + batch * b.sequence_bytes for b in timeline.host)


def _power_of_two(num_bytes: int) -> int:
    """`num_bytes` rounded up to a power of two."""
    return 1 << (num_bytes - 1).bit_length()

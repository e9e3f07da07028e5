"""Slabs of host memory: powers of two, full, and never one over another."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from snugpt.estimate.host import (
    ALIGNMENT_BYTES,
    LARGEST_SLAB_BYTES,
    SMALLEST_SLAB_BYTES,
    Slabs,
    slab_bytes,
)
from snugpt.units import MIB


@pytest.mark.parametrize("seed", range(20))
def test_no_two_tensors_share_a_byte_and_all_lie_inside_their_slab(seed):
    draw = random.Random(seed)
    slabs = Slabs()
    taken: list[tuple[int, int, int]] = []
    for _ in range(100):
        size = draw.choice([1, 511, 512, 9 * MIB, draw.randint(1, 300 * MIB)])
        slab, start = slabs.place(size)
        taken.append((slab, start, start + size))
    taken.sort()
    for slab, start, end in taken:
        assert start % ALIGNMENT_BYTES == 0
        assert end <= slabs.sizes[slab]
    for (slab, _, end), (following, start, _) in pairwise(taken):
        assert slab != following or end <= start


@pytest.mark.parametrize("seed", range(5))
def test_every_slab_is_a_power_of_two_as_the_pinned_allocator_would_make_it(seed):
    draw = random.Random(seed)
    slabs = Slabs()
    for _ in range(50):
        slabs.place(draw.randint(1, 400 * MIB))
    assert all(size & (size - 1) == 0 for size in slabs.sizes)
    assert min(slabs.sizes) >= SMALLEST_SLAB_BYTES


def test_a_few_small_tensors_pin_the_smallest_slab_and_nothing_pins_none():
    assert slab_bytes([]) == 0
    assert slab_bytes([100, 5000]) == SMALLEST_SLAB_BYTES


def test_many_matrices_pin_little_more_than_they_hold():
    matrices = [1536 * 1536 * 4, 4 * 1536 * 1536 * 4] * 200
    rounded_each = sum(1 << (size - 1).bit_length() for size in matrices)
    assert slab_bytes(matrices) < 1.06 * sum(matrices)
    assert rounded_each > 1.6 * sum(matrices)


def test_a_tensor_above_the_largest_slab_has_one_of_its_own_and_its_rest_is_used():
    slabs = Slabs()
    slabs.place(LARGEST_SLAB_BYTES + 1)
    assert slabs.sizes == [2 * LARGEST_SLAB_BYTES]
    assert slabs.place(LARGEST_SLAB_BYTES // 2).slab == 0

"""What kernels take for themselves, against figures worked out by hand from PyTorch's source."""

from __future__ import annotations

import re

import pytest

from snugpt.estimate import scratch

MIB = 2**20


@pytest.mark.parametrize(
    ("capability", "mib"),
    [((6, 1), 8.125), ((7, 5), 8.125), ((8, 0), 8.125), ((8, 9), 8.125), ((9, 0), 32),
     ((10, 0), 32), ((12, 0), 8.125), (None, 8.125)],
)  # fmt: skip
def test_data_centre_cards_from_hopper_on_have_the_large_workspace(capability, mib) -> None:
    assert scratch.cublas_workspace(capability) == mib * MIB


@pytest.mark.parametrize(
    ("D", "columns"), [(64, 64), (80, 96), (128, 128), (160, 192), (192, 192), (256, 256)]
)
def test_flash_rounds_heads_to_32_and_wide_ones_to_64(D: int, columns: int) -> None:
    assert scratch.flash_backward(1000, 6, 6, D, 2) == (1024 * 6 * 4, 1024 * 6 * columns * 4)


def test_flash_expands_the_gradients_of_grouped_heads() -> None:
    assert scratch.flash_backward(256, 8, 2, 64, 2)[2:] == (256 * 8 * 64 * 2,) * 2


def test_the_efficient_kernel_in_fp32_multiplies_and_sums_outside_of_it() -> None:
    sums, product = 1024 * 6 * 4, 1024 * 6 * 64 * 4
    for capability in ((6, 1), (7, 0), (8, 9), None):
        assert scratch.efficient_backward(1024, 6, 64, 4, capability) == (sums, product, sums)


def test_the_efficient_kernel_s_tiles_weigh_more_where_they_are_not_full() -> None:
    tiles = 16 * 6 * (64 * 64 * 4 + 16)  # 1000 queries in 16 tiles of 64
    assert scratch.efficient_backward(1000, 6, 32, 4, (7, 5)) == (1000 * 6 * 4, tiles)
    before = 1000 * 6 * 4, 1000 * 6 * 32 * 4, 1000 * 6 * 4
    assert scratch.efficient_backward(1000, 6, 32, 4, (6, 1)) == before
    assert scratch.efficient_backward(1000, 6, 64, 2, (7, 5)) == (1000 * 6 * 4, tiles)


def test_what_is_assumed_names_its_source() -> None:
    for row in scratch.ASSUMED:
        assert row.device in ("cuda", "cpu")
        assert re.fullmatch(r"ATen/[\w/]+\.(cpp|cu|cuh|h)", row.source)
        assert re.fullmatch(r"(\d+(-\d+)?(, \d+(-\d+)?)*\.?)?", row.lines)
        header = row.source.endswith((".h", ".cuh"))
        assert row.lines.endswith(".") == header

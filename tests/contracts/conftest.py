"""What the contracts share: one thread, and the campaign's script, which lies in bench/."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The CPU kernels' scratch grows with the threads; two have a test of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

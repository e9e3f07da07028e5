"""The largest batch that fits, found by trying: each trial is a child of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Attempt = Callable[[int], str | None]  # a batch goes in; "fit", "oom", or None to give up
MOST_TRIALS = 12


class Found(NamedTuple):
    """The largest batch seen to fit and the smallest seen not to; None where there was none."""

    largest_fit: int | None
    smallest_oom: int | None

    @property
    def complete(self) -> bool:
        """Whether the two are neighbours, batch 0 standing for nothing at all."""
        return self.smallest_oom is not None and self.smallest_oom - (self.largest_fit or 0) == 1


def bisect(attempt: Attempt, first: int) -> Found:
    """Try `first` and its neighbour, go on by doubling strides, then halve what lies between.

    A right prediction takes two trials. Ends early after 12 trials or when `attempt` gives up.
    """
    fit, oom = 0, 0  # 0: none seen yet
    batch, stride = max(1, first), 1
    for _ in range(MOST_TRIALS):
        outcome = attempt(batch)
        if outcome is None:
            break
        if outcome == "fit":
            fit = batch
        else:
            oom = batch
        if oom and oom - fit == 1:
            break
        if fit and oom:
            batch = (fit + oom) // 2
        else:
            batch = fit + stride if fit else max(1, oom - stride)
            stride = max(2 * stride, first // 8)
    return Found(fit or None, oom or None)

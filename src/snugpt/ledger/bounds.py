"""What few trials can prove: the exact bound of Clopper and Pearson on a rate."""

from __future__ import annotations

from math import comb

CONFIDENCE = 0.95


def binomial_tail(successes: int, trials: int, rate: float) -> float:
    """The chance of at most `successes` in `trials` of the given rate."""
    return sum(
        comb(trials, k) * rate**k * (1.0 - rate) ** (trials - k) for k in range(successes + 1)
    )


def upper_bound(successes: int, trials: int, confidence: float = CONFIDENCE) -> float | None:
    """The one-sided upper bound on a rate (Clopper and Pearson, Biometrika 26, 1934).

    The largest p for which at most `successes` of `trials` still has the chance 1 - confidence:
    sum over k = 0 .. successes of C(n, k) p^k (1 - p)^(n - k) = 1 - confidence. None without
    trials, 1 where all succeeded; for none that did it is 1 - (1 - confidence)^(1 / n).
    """
    if trials == 0:
        return None
    if successes == trials:
        return 1.0
    low, high = successes / trials, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        if binomial_tail(successes, trials, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high

"""The order of rows in training: a permutation per epoch, computed from (seed, epoch), not stored.

The permutation is a small Feistel network over the next power of two, walked until it lands inside:
M. Luby, C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", SIAM
J. Comput. 17 (1988); J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002
(cycle walking). The mixing function is SplitMix64's: G. Steele, D. Lea, C. Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Four rounds are enough for random functions (Luby, Rackoff); halves of a few bits mix slower.
_NUM_ROUNDS = 8
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOrder:
    """An endless sequence of row numbers; each epoch of `num_rows` positions has every row once.

    Memory and time per position do not depend on `num_rows`.
    """

    num_rows: int
    seed: int

    def __post_init__(self) -> None:
        assert self.num_rows >= 1, self.num_rows

    def rows(self, first_position: int, count: int) -> np.ndarray:
        """Return the rows at positions [first_position, first_position + count); (count,) int64."""
        positions = np.arange(first_position, first_position + count, dtype=np.uint64)
        epochs, places = np.divmod(positions, np.uint64(self.num_rows))
        seed = np.uint64(self.seed % 2**64)
        keys = _mix(_mix(np.full(count, seed)) + epochs)
        return self._permuted(places, keys).astype(np.int64)

    def _permuted(self, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        num_bits = (self.num_rows - 1).bit_length()
        rows = _feistel(places, keys, num_bits)
        # The power of two is less than twice num_rows, so a walk is under two steps on average.
        while (outside := np.flatnonzero(rows >= self.num_rows)).size:
            rows[outside] = _feistel(rows[outside], keys[outside], num_bits)
        return rows


def _feistel(values: np.ndarray, keys: np.ndarray, num_bits: int) -> np.ndarray:
    """Permute [0, 2**num_bits): the halves change each other in turn, so it can be undone."""
    low_bits = np.uint64(num_bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = np.uint64((1 << (num_bits - num_bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for number in range(_NUM_ROUNDS):
        keys = keys + _GOLDEN_GAMMA
        if number % 2:
            low = low ^ (_mix(keys ^ high) & low_mask)
        else:
            high = high ^ (_mix(keys ^ low) & high_mask)
    return (high << low_bits) | low


def _mix(values: np.ndarray) -> np.ndarray:
    """Return SplitMix64's output function of each 64-bit value; arithmetic wraps on purpose."""
    values = values + _GOLDEN_GAMMA
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values

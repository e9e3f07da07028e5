"""Units: the only place that divides by 2**30, and the only place that turns numbers into words.

Bytes are integers until they are printed. GiB is 2**30 bytes; "80 GB" occurs only in product names.
"""

from __future__ import annotations

KIB = 2**10
MIB = 2**20
GIB = 2**30
SECONDS_PER_HOUR = 3600.0


def gib(num_bytes: float) -> str:
    """Write bytes as GiB with three significant figures, or MiB and KiB below that."""
    if abs(num_bytes) >= GIB / 10:
        return f"{_three(num_bytes / GIB)} GiB"
    if abs(num_bytes) >= MIB / 10:
        return f"{_three(num_bytes / MIB)} MiB"
    if abs(num_bytes) >= KIB:
        return f"{_three(num_bytes / KIB)} KiB"
    return f"{num_bytes:.0f} B"


def gib_of(need_bytes: float, have_bytes: float) -> str:
    """Write `24.1 GiB of 23.5 GiB`, with more digits where both would read the same."""
    need, have = gib(need_bytes), gib(have_bytes)
    digits = 2
    while need == have and need_bytes != have_bytes and digits < 10:
        need, have = (f"{size / GIB:,.{digits}f} GiB" for size in (need_bytes, have_bytes))
        digits += 1
    return f"{need} of {have}"


def count(number: float) -> str:
    """Write a count with a decimal suffix: 286M, 1.38B."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= limit:
            return f"{_three(number / limit)}{suffix}"
    return f"{number:.0f}"


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """Write a number of things: 1 layer, 12 layers, 1 pass, 2 passes (where `nouns` says that)."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def duration(seconds: float) -> str:
    """Write a time span in the unit a person would use: 42 s, 3.1 min, 2.4 h, 12 days."""
    if seconds < 120:
        return f"{_three(seconds)} s"
    if seconds < 2 * SECONDS_PER_HOUR:
        return f"{_three(seconds / 60)} min"
    if seconds < 72 * SECONDS_PER_HOUR:
        return f"{_three(seconds / SECONDS_PER_HOUR)} h"
    return f"{_three(seconds / (24 * SECONDS_PER_HOUR))} days"


def _three(value: float) -> str:
    magnitude = abs(value)
    if magnitude >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if magnitude >= 9.995 else f"{value:.2f}"


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple

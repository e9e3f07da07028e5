"""The table of a dry run: what is predicted of each configuration, and nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from campaign.configurations import Configuration
from snugpt.spec.memory import MemoryEstimate
from snugpt.units import MIB

NO_FIGURE = {
    "scratch": "bytes of single kernels, counted one by one",
    "boundary": "the largest batch under a cap, found by trials",
    "peer": "nanochat's own code, run without a prediction",
}
TOY = (
    "every row is shrunk to toy size (2 layers, 64 wide, up to 64 tokens, at most 2 sequences,",
    "fp32); the names are those of the full-size configurations",
)


def table(
    configurations: Iterable[Configuration],
    predicted: Callable[[Configuration], MemoryEstimate | None],
    *,
    device: str,
    toy: bool,
) -> Iterator[str]:
    """Lines: requested, allocated and reserved bytes in MiB.

    `predicted` gives None for what is measured without a prediction.
    """
    configurations = tuple(configurations)
    yield f"predicted for {device}, peaks in MiB; nothing was run"
    if toy:
        yield from TOY
    yield f"{'configuration':<42}{'requested':>10}{'allocated':>10}{'reserved':>10} held out"
    dashed = False
    for each in configurations:
        said, held = predicted(each), "h" * each.held_out
        sizes = (None,) * 3
        if said is not None:
            sizes = (said.requested_bytes, said.allocated_bytes, said.reserved_bytes.expected)
        cells = "".join(f"{'-' if s is None else f'{s / MIB:.1f}':>10}" for s in sizes)
        why = NO_FIGURE[each.kind] if said is None else ""
        dashed |= said is None
        yield f"{each.name:<42}{cells} {held:<1} {why}".rstrip()
    if any(each.held_out for each in configurations):
        yield "h: held out, compared with what is measured and never used in a fit"
    if dashed:
        yield "-: no peak is predicted; the row measures what stands beside it"

"""A trace of somebody's model on one screen of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator

from snugpt.cli.screen import COLUMNS, row
from snugpt.errors import SnugError
from snugpt.tracing.trace_result import Trace, dtype_name
from snugpt.units import count, gib

SHOWN = 10
SIZE_COLUMNS = 10


def screen(trace: Trace) -> Iterator[str]:
    """Yield the lines: verdict, memory, phases, the largest tensors, the largest batch, notes."""
    what = "train" if trace.tracer.train else "run"
    verdict = "FITS" if trace.fits else "DOES NOT FIT"
    tokens = f" x {trace.seq_len} tokens" if trace.seq_len else ""
    batch = f"batch {trace.batch_size}{tokens}"
    head = f"{what} {count(trace.tracer.num_parameters)} parameters, {batch}"
    yield head.ljust(COLUMNS - len(verdict)) + verdict
    yield f"on {trace.gpu.name} ({trace.gpu.id}), {gib(trace.capacity_bytes)} usable"
    yield ""
    process, room = trace.process_bytes, trace.capacity_bytes - trace.process_bytes.high
    left = f"{gib(room)} to spare" if room >= 0 else f"{gib(-room)} too much"
    yield from row(
        "memory",
        f"process {gib(process.expected)} ({gib(process.low)} to {gib(process.high)}), {left}",
    )
    yield from row(
        "peak",
        f"in {trace.peak_phase}: requested {gib(trace.requested_bytes)}, allocated"
        f" {gib(trace.allocated_bytes)}, reserved {gib(trace.reserved_bytes.expected)}"
        f" (up to {gib(trace.reserved_bytes.high)})",
    )
    yield from row("phases", ", ".join(f"{phase} {gib(n)}" for phase, n in trace.phases.items()))
    autocast = dtype_name(trace.tracer.autocast)
    yield from row("dtypes", f"autocast {autocast}" if autocast else "as the model has them")
    if trace.attention:
        kernels = ", ".join(f"{n} x {kernel}" for kernel, n in trace.attention.items())
        yield from row("attends", kernels)
    yield from row("batch", _largest(trace))
    yield ""
    yield "largest tensors at the peak"
    for each in trace.tensors[:SHOWN]:
        number = f"{each.count} x " if each.count > 1 else ""
        text = f"{number}{each.name}"
        yield gib(each.bytes).rjust(SIZE_COLUMNS) + "  " + _cut(text, COLUMNS - SIZE_COLUMNS - 2)
    rest = sum(each.bytes for each in trace.tensors[SHOWN:])
    if rest:
        yield gib(rest).rjust(SIZE_COLUMNS) + f"  in {len(trace.tensors) - SHOWN} kinds more"
    for note in trace.notes:
        yield from row("note", note)


def _largest(trace: Trace) -> str:
    try:
        largest = trace.largest_batch()
    except SnugError as error:
        return f"the largest is not known: {error.message}"
    if largest is None:
        return "no end found: memory hardly depends on it"
    return f"the largest that fits is {largest}" if largest else "not one sequence fits"


def _cut(text: str, columns: int) -> str:
    """The end of a name tells more than its middle."""
    if len(text) <= columns:
        return text
    keep = columns - 1
    return text[: keep // 3] + "…" + text[-(keep - keep // 3) :]

"""The file of records, one JSON line each, forced to disk; and the table at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from snugpt.units import MIB

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """Every whole record of a file; none where it is missing. A torn line is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "name" in record:
            found.append(record)
    return found


def append(path: Path, record: Record) -> None:
    """Add one line; on return it is on disk. A torn last line is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            file.write(b"\n" if torn else b"")
        file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def newest(records: Iterable[Record]) -> dict[str, Record]:
    """The last record of each configuration; a run repeated after a failure takes its place."""
    return {r["name"]: r for r in records if r["kind"] != "environment"}


def table(records: Iterable[Record]) -> list[str]:
    """Predicted and measured peaks in MiB, in lines of at most 80 columns.

    `asked` and `alloc` are the requested and allocated bytes that were predicted, `ratio` is
    predicted ÷ measured allocated; `h` marks what is held out of any fit.
    """
    lines = [f"{'MiB':<33}{'asked':>9}{'alloc':>9}{'measured':>10}{'ratio':>8}{'ms':>8} h"]
    lines += [line for record in records for line in _lines(record)]
    return [line.rstrip() for line in lines]


def _lines(record: Record) -> Iterable[str]:
    name, held = f"{record['name'][:32]:<33}", "h" if record.get("held_out") else ""
    if record["outcome"] != "fit":
        reason = "" if record["outcome"] == "oom" else str(record.get("reason"))
        yield f"{name}{_predicted(record)}{record['outcome']:>10} {reason}"[:79]
    elif record["kind"] == "boundary":
        found, said = record["measured"], record["predicted"]
        yield (
            f"{name}fits {found['largest_fit']}, not {found['smallest_oom']};"
            f" predicted {said['batch']['expected']}"
        )
    elif record["kind"] == "scratch":
        yield from _scratch(record)
    else:
        measured = record["measured"]["allocated_bytes"]
        said = (record["predicted"] or {}).get("allocated_bytes")
        ratio = f"{said / measured:.4f}" if said else "-"
        times = record["measured"].get("step_ms") or record["measured"].get("generate_ms")
        ms = f"{min(times):.1f}" if times else "-"
        yield f"{name}{_predicted(record)}{measured / MIB:>10.1f}{ratio:>8}{ms:>8} {held}"


def _scratch(record: Record) -> Iterable[str]:
    yield record["name"]
    for case in record["measured"]["cases"]:
        said = case["predicted_scratch_bytes"]
        known = "" if said is None else f"{said / MIB:.3f}"
        yield f"  {case['case'][:48]:<49}{known:>9}{case['scratch_bytes'] / MIB:>10.3f}"

    for name, reason in record["measured"]["missing"].items():
        yield f"  {name} not counted: {reason}"[:79]


def _predicted(record: Record) -> str:
    said = record.get("predicted")
    if not said or "requested_bytes" not in said:
        return f"{'-':>9}{'-':>9}"
    return f"{said['requested_bytes'] / MIB:>9.1f}{said['allocated_bytes'] / MIB:>9.1f}"

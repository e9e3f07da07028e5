"""The ledger: one JSON line per measurement, appended to one file, never rewritten.

A line is one write to a file opened for appending, under a lock and forced to disk. Whatever kills
a writer, lines already there stay whole; a line it left torn is skipped by readers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from snugpt.errors import FailedError
from snugpt.spec.measurement import Measurement, measurement_from_json

LEDGER_NAME = "measurements.jsonl"


def warn_on_stderr(line: str) -> None:
    """Write one line of warning to stderr."""
    sys.stderr.write(f"{line}\n")


def append(folder: Path, measurement: Measurement) -> Path:
    """Add one measurement to the ledger in `folder`, made if it is not there; return the file.

    On return the line is on disk. Any number of processes may append at once.

    Raises:
        FailedError: the folder can't be written or the disk is full.
    """
    path = folder / LEDGER_NAME
    line = msgspec.json.encode(measurement) + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path) as descriptor:
            line = _separator(descriptor) + line
            written = os.write(descriptor, line)
            os.fsync(descriptor)
    except OSError as error:
        raise _not_written(path, error.strerror or str(error)) from error
    if written < len(line):
        raise _not_written(path, "no space left")
    return path


def read_all(folder: Path, warn: Callable[[str], None] = warn_on_stderr) -> list[Measurement]:
    """Return every measurement of the ledger in `folder`, oldest first; none if there is no file.

    A line that can't be read is skipped, and `warn` is told in one line. Keys that this version
    does not know are ignored.

    Raises:
        FailedError: the file is there but can't be opened.
    """
    path = folder / LEDGER_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FailedError(
            f"could not read {path}: {error.strerror or error}", hint=f"ls -l {path}"
        ) from error
    return list(_measurements(path, content, warn))


def _measurements(path: Path, content: bytes, warn: Callable[[str], None]) -> Iterator[Measurement]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield measurement_from_json(line)
        except FailedError as error:
            reason = " ".join(error.message.split())
            warn(f"warning: {path} line {number} skipped: {reason}")


def _separator(descriptor: int) -> bytes:
    """A line break if the file ends in a torn line, so that the next one is whole."""
    size_bytes = os.fstat(descriptor).st_size
    if size_bytes == 0:
        return b""
    os.lseek(descriptor, size_bytes - 1, os.SEEK_SET)
    return b"" if os.read(descriptor, 1) == b"\n" else b"\n"


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open the ledger for appending, alone: the check for a torn line and the write are one act."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o644)
    try:
        if sys.platform != "win32":
            import fcntl

            # Given back by the system when the descriptor closes, also after kill -9.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _not_written(path: Path, reason: str) -> FailedError:
    return FailedError(f"could not write {path}: {reason}", hint=f"df -h {path.parent}")

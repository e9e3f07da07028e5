"""One writer per run: a lock the system lets go of when its holder dies, however it dies."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from snugpt.errors import FailedError

LOCK_FILE = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run in `folder`, so that no second trainer writes into it.

    The file stays when the lock is let go: deleting it would let two processes hold two files of
    one name. Systems without flock (Windows) get no lock.

    Raises:
        FailedError: another process holds it, or the folder can't be written.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise FailedError(
            f"could not lock {folder}: {error.strerror or error}",
            hint=shlex.join(["ls", "-ld", str(folder)]),
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise _refusal(folder, descriptor, error) from error
        with suppress(OSError):  # the number only serves the refusal's text; a disk may be full
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _refusal(folder: Path, descriptor: int, error: OSError) -> FailedError:
    if not isinstance(error, BlockingIOError):
        return FailedError(
            f"could not lock {folder}: {error.strerror or error}",
            hint=shlex.join(["df", "-T", str(folder)]),
        )
    holder = os.pread(descriptor, 20, 0).decode(errors="replace")
    if not holder.isdecimal():  # it has not written its number yet
        return FailedError(f"another process is writing the run {folder}", hint="ps -ef")
    return FailedError(f"process {holder} is writing the run {folder}", hint=f"ps -fp {holder}")

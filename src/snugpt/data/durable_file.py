"""Files that are whole or absent: written under another name, forced to disk, then renamed."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from snugpt.errors import FailedError

PARTIAL_SUFFIX = ".partial"


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at `path` only when the block ends well.

    A reader sees the old file or the new one, never a part, also after a power cut. If the block
    or the disk fails, the part already written is removed; a failing disk raises FailedError.
    """
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise FailedError(
            f"could not write {path}: {error.strerror or error}",
            hint=f"df -h {shlex.quote(str(path.parent))}",
        ) from error
    finally:
        # After the rename there is nothing left under this name. A folder that can't be written
        # has already been reported above.
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """The other name a file is written under; each call gives another one, equally long."""
    # The process number and a random part keep two processes that prepare the same data apart.
    return path.with_name(f".{path.name}.{os.getpid():07}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}")


def write_durably(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all; raises FailedError if the disk fails."""
    with durable_file(path) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Force a folder to disk: only then is a rename in it durable."""
    # Only POSIX can open a folder for that.
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

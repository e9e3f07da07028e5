"""The manifest of a checkpoint: the size and SHA-256 of each of its files, written last.

Neither torch.load nor safetensors notices a flipped bit in a weight; the manifest does.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from snugpt.data.durable_file import durable_file, write_durably

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "MANIFEST.json"
FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
LARGEST_MANIFEST_BYTES = 4096  # three entries need some 400
READ_BYTES = 1 << 20


class FileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one file must be."""

    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every file of the folder must be."""

    schema: Literal["snugpt.checkpoint/1"]
    files: dict[str, FileRecord]


def write_recorded(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write `chunks` durably and return what was written, hashed on the way, not read back.

    Raises:
        FailedError: the disk is full or fails.
    """
    digest, size_bytes = hashlib.sha256(), 0
    with durable_file(path) as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size_bytes += len(chunk)
    return FileRecord(size_bytes, digest.hexdigest())


def write_manifest(folder: Path, files: dict[str, FileRecord]) -> None:
    """Write the folder's manifest; it makes the files before it a checkpoint."""
    manifest = Manifest("snugpt.checkpoint/1", files)
    write_durably(folder / MANIFEST_FILE, msgspec.json.encode(manifest))


def damage(folder: Path, names: Iterable[str] = FILES) -> str | None:
    """Read the named files of a checkpoint whole; say what is wrong with it, or None.

    A symbolic link, a device or any name but the three in `FILES` is damage too: nothing outside
    the folder is ever opened.
    """
    name = MANIFEST_FILE
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return "not a folder"
        manifest = _read_manifest(folder / name)
        if set(manifest.files) != set(FILES):
            return f"{name} does not list {', '.join(FILES)}"
        for name in names:
            wrong = _difference(folder / name, manifest.files[name])
            if wrong:
                return f"{name} {wrong}"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} can't be read: {error.strerror or error}"
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return f"{name} is not a manifest"
    return None


def _read_manifest(path: Path) -> Manifest:
    if not _is_plain_file(path):
        raise ValueError("not a plain file")
    with path.open("rb") as file:
        return msgspec.json.decode(file.read(LARGEST_MANIFEST_BYTES), type=Manifest)


def _difference(path: Path, record: FileRecord) -> str | None:
    """Say how a file differs from its record, or None."""
    if not _is_plain_file(path):
        return "is not a plain file"
    size_bytes = path.lstat().st_size
    if size_bytes != record.size_bytes:
        return f"has {size_bytes} bytes instead of {record.size_bytes}"
    digest = hashlib.sha256()
    # Unbuffered: the reads are large already
    with open(path, "rb", buffering=0, opener=_open_no_link) as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return None if digest.hexdigest() == record.sha256 else "differs from its sha256"


def _is_plain_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _open_no_link(path: str, flags: int) -> int:
    # A link put there after the look above is refused by the system. Windows lacks the flag.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))

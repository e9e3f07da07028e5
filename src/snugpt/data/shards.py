"""Token shards: ids on disk as a raw little-endian array beside a JSON index, mapped into memory.

    train.bin         uint16, or uint32 past 65,536 entries; no header, as nanoGPT and llm.c have it
    train.index.json  ShardIndex; written last, so an index says that its .bin is whole

Ids are checked against the index when a shard is opened.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import numpy as np

from snugpt.data.durable_file import durable_file, write_durably
from snugpt.data.split import SplitName
from snugpt.data.tokenizer import Tokenizer
from snugpt.errors import FailedError
from snugpt.units import MIB

SHARD_VERSION = 1

# Hashing runs at about 1 GiB/s: every opening checks content up to here, size beyond.
_ALWAYS_HASHED_BYTES = 256 * MIB

DtypeName = Literal["uint16", "uint32"]


class ShardIndex(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a shard holds and what it was made of."""

    version: int
    split: SplitName
    dtype: DtypeName
    num_tokens: int
    num_text_bytes: int
    """UTF-8 bytes the tokens stand for: what bits per byte divides by."""
    tokens_sha256: str
    tokenizer_sha256: str
    corpus_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShard:
    """An open shard; `tokens` is a read-only (num_tokens,) array backed by the file."""

    index: ShardIndex
    tokens: np.ndarray = field(repr=False)

    @property
    def num_tokens(self) -> int:
        """Number of token ids, separators included."""
        return self.index.num_tokens


@dataclass(slots=True)
class ShardWriter:
    """Takes the tokens of one shard, block by block."""

    file: BinaryIO
    tokenizer: Tokenizer
    num_tokens: int = 0
    num_text_bytes: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def append(self, tokens: np.ndarray) -> None:
        """Write a block of ids; raises OSError if the disk is full (the shard is then dropped)."""
        content = np.ascontiguousarray(tokens, self.tokenizer.dtype).data
        self.file.write(content)
        self.digest.update(content)
        self.num_tokens += len(tokens)
        self.num_text_bytes += int(self.tokenizer.token_bytes[tokens].sum())


@contextmanager
def shard_writer(
    folder: Path, split: SplitName, tokenizer: Tokenizer, corpus_sha256: str
) -> Iterator[ShardWriter]:
    """Write one shard; it exists once the block has ended well, and not at all otherwise.

    Raises FailedError if the disk fails.
    """
    with durable_file(_tokens_path(folder, split)) as file:
        # An older index would vouch for the new tokens between the two renames.
        _index_path(folder, split).unlink(missing_ok=True)
        writer = ShardWriter(file, tokenizer)
        yield writer
    index = ShardIndex(
        version=SHARD_VERSION,
        split=split,
        dtype="uint16" if tokenizer.dtype.itemsize == 2 else "uint32",
        num_tokens=writer.num_tokens,
        num_text_bytes=writer.num_text_bytes,
        tokens_sha256=writer.digest.hexdigest(),
        tokenizer_sha256=tokenizer.sha256,
        corpus_sha256=corpus_sha256,
    )
    write_durably(_index_path(folder, split), msgspec.json.format(msgspec.json.encode(index)))


def open_shard(folder: Path, split: SplitName) -> TokenShard:
    """Map a shard into memory after checking it; raises FailedError if absent or damaged.

    The size must match the index always, the sha256 up to 256 MiB (`verify_shard` checks any size).
    """
    index = _read_index(folder, split)
    path = _tokens_path(folder, split)
    dtype = np.dtype(index.dtype).newbyteorder("<")
    expected_bytes = index.num_tokens * dtype.itemsize
    try:
        found_bytes = path.stat().st_size
        if found_bytes != expected_bytes:
            raise _damaged(path, f"{found_bytes} bytes, {expected_bytes} by its index")
        # An empty file can't be mapped.
        tokens = np.memmap(path, dtype, mode="r") if found_bytes else np.empty(0, dtype)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    shard = TokenShard(index=index, tokens=tokens)
    if found_bytes <= _ALWAYS_HASHED_BYTES:
        verify_shard(folder, shard)
    return shard


def verify_shard(folder: Path, shard: TokenShard) -> None:
    """Hash every token; raises FailedError if one bit differs from what was written."""
    if hashlib.sha256(shard.tokens.data).hexdigest() != shard.index.tokens_sha256:
        raise _damaged(_tokens_path(folder, shard.index.split), "its tokens have changed")


def _read_index(folder: Path, split: SplitName) -> ShardIndex:
    path = _index_path(folder, split)
    try:
        index = msgspec.json.decode(path.read_bytes(), type=ShardIndex)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error
    if index.version != SHARD_VERSION or index.split != split:
        raise _damaged(path, f"version {index.version}, split {index.split!r}")
    return index


def _tokens_path(folder: Path, split: SplitName) -> Path:
    return folder / f"{split}.bin"


def _index_path(folder: Path, split: SplitName) -> Path:
    return folder / f"{split}.index.json"


def _damaged(path: Path, reason: str) -> FailedError:
    return FailedError(
        f"{path} is damaged: {reason}", hint=f"rm -r {shlex.quote(str(path.parent))}"
    )

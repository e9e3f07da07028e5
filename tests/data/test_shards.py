"""Shards come back as they were written, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from snugpt.data.shards import open_shard, shard_writer
from snugpt.data.tokenizer import byte_tokenizer
from snugpt.errors import FailedError

TOKENIZER = byte_tokenizer()
TOKENS = np.arange(256, dtype=np.uint16)


def _write(folder: Path, *blocks: np.ndarray) -> None:
    with shard_writer(folder, "train", TOKENIZER, "corpus") as writer:
        for block in blocks:
            writer.append(block)


def _damage(folder: Path) -> str:
    with pytest.raises(FailedError) as caught:
        open_shard(folder, "train")
    assert "\n" not in caught.value.message
    assert caught.value.hint == f"rm -r {folder}"
    return caught.value.message


def test_tokens_come_back_with_their_index(tmp_path: Path) -> None:
    _write(tmp_path, TOKENS[:100], TOKENS[100:])
    shard = open_shard(tmp_path, "train")
    assert shard.tokens.tolist() == TOKENS.tolist()
    assert isinstance(shard.tokens, np.memmap)
    assert (shard.num_tokens, shard.index.num_text_bytes) == (256, 256)
    assert shard.index.dtype == "uint16"
    assert (shard.index.corpus_sha256, shard.index.tokenizer_sha256) == ("corpus", TOKENIZER.sha256)


def test_file_is_little_endian_without_header(tmp_path: Path) -> None:
    _write(tmp_path, np.array([1, 255]))
    assert (tmp_path / "train.bin").read_bytes() == b"\x01\x00\xff\x00"


def test_empty_shard_opens(tmp_path: Path) -> None:
    _write(tmp_path)
    assert open_shard(tmp_path, "train").num_tokens == 0


def test_tokens_are_read_only(tmp_path: Path) -> None:
    _write(tmp_path, TOKENS)
    with pytest.raises(ValueError, match="read-only"):
        open_shard(tmp_path, "train").tokens[0] = 1


@pytest.mark.parametrize("position", [0, 255, 511])
def test_one_flipped_bit_is_noticed(tmp_path: Path, position: int) -> None:
    _write(tmp_path, TOKENS)
    content = bytearray((tmp_path / "train.bin").read_bytes())
    content[position] ^= 4
    (tmp_path / "train.bin").write_bytes(content)
    assert "its tokens have changed" in _damage(tmp_path)


def test_cut_file_is_noticed(tmp_path: Path) -> None:
    _write(tmp_path, TOKENS)
    (tmp_path / "train.bin").write_bytes(b"\0" * 511)
    assert "511 bytes, 512 by its index" in _damage(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"version": "1"}', b"\xff"])
def test_damaged_index_is_noticed(tmp_path: Path, content: bytes) -> None:
    _write(tmp_path, TOKENS)
    (tmp_path / "train.index.json").write_bytes(content)
    assert "train.index.json is damaged" in _damage(tmp_path)


def test_index_of_another_version_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, TOKENS)
    index = tmp_path / "train.index.json"
    index.write_text(index.read_text().replace('"version": 1', '"version": 2'))
    assert "version 2" in _damage(tmp_path)


@pytest.mark.parametrize("name", ["train.bin", "train.index.json"])
def test_missing_file_is_noticed(tmp_path: Path, name: str) -> None:
    _write(tmp_path, TOKENS)
    (tmp_path / name).unlink()
    assert f"{name} is damaged: No such file" in _damage(tmp_path)


def test_full_disk_leaves_nothing(tmp_path: Path, largest_file_bytes) -> None:
    with largest_file_bytes(10_000), pytest.raises(FailedError, match=r"could not write .*train"):
        _write(tmp_path, *[TOKENS] * 50)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with shard_writer(tmp_path, "train", TOKENIZER, "corpus") as writer:
            writer.append(TOKENS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []

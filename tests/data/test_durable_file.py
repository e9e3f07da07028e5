"""A file is whole or absent, whatever the disk does."""

from __future__ import annotations

from pathlib import Path

import pytest

from snugpt.data.durable_file import durable_file, write_durably
from snugpt.errors import FailedError


def test_content_arrives_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_durably(tmp_path / "new" / "file", b"abc")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    assert (tmp_path / "new" / "file").read_bytes() == b"abc"


def test_file_is_absent_until_the_block_ends(tmp_path: Path) -> None:
    with durable_file(tmp_path / "file") as file:
        file.write(b"abc")
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "file").exists()


def test_failing_block_leaves_the_old_file(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", b"old")

    def interrupted() -> None:
        with durable_file(tmp_path / "file") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_full_disk_leaves_the_old_file(tmp_path: Path, largest_file_bytes) -> None:
    write_durably(tmp_path / "file", b"old")
    with largest_file_bytes(1000), pytest.raises(FailedError, match=r"could not write .*file"):
        write_durably(tmp_path / "file", b"x" * 2000)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FailedError) as caught:
        write_durably(tmp_path / "file" / "below", b"x")
    assert "\n" not in caught.value.message

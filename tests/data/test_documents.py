"""Which files count as text, and what is said about those that don't."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from snugpt.data.documents import find_files, read_documents
from snugpt.errors import BadQuestionError


def _refusal(path: Path) -> BadQuestionError:
    with pytest.raises(BadQuestionError) as caught:
        list(read_documents(path))
    error = caught.value
    assert error.message.startswith("input = ")
    assert "\n" not in error.message
    assert error.hint
    return error


def test_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("eins\r\n\r\nzwei ä\r".encode())
    assert list(read_documents(file)) == ["eins\r\n\r\nzwei ä\r"]


def test_jsonl_has_a_document_per_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "\\u00e4\\n", "id": 3}\n{"text": " "}')
    assert list(read_documents(file)) == ["one", "ä\n"]


@pytest.mark.parametrize(
    "line",
    ['{"text": "cut', "[1]", "3", '{"txt": "x"}', '{"text": 3}', '{"text": "\\ud800"}', "[" * 9**6],
)
def test_bad_jsonl_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    error = _refusal(file)
    assert f"{file}:2" in error.message
    assert error.hint == f"sed -n 2p {file}"


def test_jsonl_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "\xff"}\n')
    assert f"{file}:1" in _refusal(file).message


def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("Käse".encode("latin1"))
    assert "byte 1" in _refusal(file).message


def test_text_that_ends_inside_a_character_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cut.txt"
    file.write_bytes("aä".encode()[:-1])
    assert "byte 1" in _refusal(file).message


def test_beginning_of_a_file_may_end_inside_a_character(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("aäb".encode())
    assert list(read_documents(file, max_bytes=2)) == ["a"]
    assert list(read_documents(file, max_bytes=4)) == ["aäb"]


def test_beginning_of_jsonl_ends_after_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(10)))
    assert list(read_documents(file, max_bytes=20)) == ["0", "1"]


def test_folder_is_walked_in_sorted_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/.hidden", ".git/config", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    files, num_skipped = find_files(str(tmp_path))
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["a/z.md", "b.txt", "c.txt"]
    assert num_skipped == 1


def test_folder_with_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert find_files(str(tmp_path)) == ((), 0)
    with pytest.raises(BadQuestionError, match="neither a file nor a folder"):
        find_files(str(tmp_path / "pipe"))


def test_binary_file_named_by_itself_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    file.write_bytes(b"\x89PNG\0\0")
    with pytest.raises(BadQuestionError, match="a binary file"):
        find_files(str(file))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("/no/such/file.txt", "no such file or folder"),
        ("zero\0byte", "no such file or folder"),
        ("x" * 5000, "can't be read: File name too long"),
        ("", "neither a file nor a folder"),
    ],
)
def test_name_of_nothing_is_refused_with_a_command(source: str, reason: str) -> None:
    with pytest.raises(BadQuestionError, match=reason) as caught:
        find_files(source)
    assert caught.value.hint == "snugpt train --input builtin"


def test_file_that_vanishes_is_a_refusal_not_a_traceback(tmp_path: Path) -> None:
    assert "can't be read: No such file" in _refusal(tmp_path / "gone.txt").message

"""Documents read from the user's files: which files count, and what text each one holds.

A text file (.txt, .md, any other suffix) is one document. A .jsonl file has one document per line,
in its "text" field. A folder is walked in sorted order; hidden and binary files in it are left out.
Text is UTF-8, taken as it stands: no new-line translation, so bytes in are bytes out.
"""

from __future__ import annotations

import codecs
import json
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snugpt.errors import BadQuestionError, bad_value

JSONL_SUFFIXES = (".jsonl", ".ndjson")
BUILTIN_HINT = "snugpt train --input builtin"

# Git and grep call a file binary by the same sign: a zero byte near its start.
_BINARY_PROBE_BYTES = 8192


def find_files(source: str) -> tuple[tuple[Path, ...], int]:
    """Return the files `source` names, in sorted order, and how many binary ones were left out.

    Raises BadQuestionError if nothing is there, or if a file named by itself is binary.
    """
    path = Path(source)
    try:
        mode = path.stat().st_mode if source else 0
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = "no such file or folder"
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            reason = f"can't be read: {error.strerror}"
        raise bad_value("input", source, reason, hint=BUILTIN_HINT) from error
    if stat.S_ISDIR(mode):
        return _walk(path)
    if not stat.S_ISREG(mode):
        raise bad_value("input", source, "neither a file nor a folder", hint=BUILTIN_HINT)
    if _is_binary(path):
        raise bad_value(
            "input", source, "a binary file; UTF-8 text or .jsonl is needed", hint=BUILTIN_HINT
        )
    return (path,), 0


def read_documents(path: Path, max_bytes: int | None = None) -> Iterator[str]:
    """Yield the documents of one file, blank ones left out.

    With `max_bytes` only about that much of the file's beginning is read, and a text file's
    document is cut there: enough to estimate from.
    Raises BadQuestionError that names the file (and the line) if it can't be read as text.
    """
    try:
        documents = _json_lines if path.suffix.lower() in JSONL_SUFFIXES else _whole_text
        for document in documents(path, max_bytes):
            if document and not document.isspace():
                yield document
    except OSError as error:
        reason = f"can't be read: {error.strerror or error}"
        raise bad_value("input", str(path), reason, hint=BUILTIN_HINT) from error


def _walk(root: Path) -> tuple[tuple[Path, ...], int]:
    files: list[Path] = []
    for folder, folder_names, file_names in os.walk(root, onerror=_raise_unreadable):
        folder_names[:] = [name for name in folder_names if not name.startswith(".")]
        files += [Path(folder, name) for name in file_names if not name.startswith(".")]
    files = sorted(file for file in files if file.is_file())
    texts = tuple(file for file in files if not _is_binary(file))
    return texts, len(files) - len(texts)


def _raise_unreadable(error: OSError) -> None:
    reason = f"can't be read: {error.strerror or error}"
    raise bad_value("input", error.filename, reason, hint=BUILTIN_HINT) from error


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(_BINARY_PROBE_BYTES)
    except OSError as error:
        _raise_unreadable(error)
        raise


def _whole_text(path: Path, max_bytes: int | None) -> Iterator[str]:
    with path.open("rb") as file:
        content = file.read() if max_bytes is None else file.read(max_bytes)
        is_whole = max_bytes is None or len(content) < max_bytes or not file.read(1)
    # A beginning may end in the middle of a character; only a whole file must end at one.
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        yield decoder.decode(content, final=is_whole)
    except UnicodeDecodeError as error:
        raise bad_value(
            "input",
            str(path),
            f"not UTF-8 text (byte {error.start})",
            hint=f"iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > utf8.txt",
        ) from error


def _json_lines(path: Path, max_bytes: int | None) -> Iterator[str]:
    num_read_bytes = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _text_field(line, f"{path}:{number}")
            num_read_bytes += len(line)
            if max_bytes is not None and num_read_bytes >= max_bytes:
                return


def _text_field(line: bytes, place: str) -> str:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise _bad_line(place, f"not JSON ({reason})") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise _bad_line(place, 'a JSON object with a string field "text" is needed')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which no UTF-8 text can hold.
        raise _bad_line(place, f"a lone surrogate at character {error.start}") from error
    return text


def _bad_line(place: str, reason: str) -> BadQuestionError:
    file, _, line = place.rpartition(":")
    return bad_value("input", place, reason, hint=f"sed -n {line}p {shlex.quote(file)}")

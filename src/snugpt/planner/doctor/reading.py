"""A log as lines of text: whatever wrote it, however large; nothing in it is passed on raw.

Of a large log the head (how it was started), the tail (how it ended) and the neighbourhood of the
first and last place where each marker stands are kept, so that 1 GB takes a few MB of memory.
Terminal codes and control characters are taken out, Windows' line ends and UTF-16 are understood.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from snugpt.errors import BadQuestionError
from snugpt.units import KIB, MIB

WHOLE_BYTES = 4 * MIB  # a log up to this size is read as it is
HEAD_BYTES = MIB
TAIL_BYTES = 2 * MIB
WINDOW_BYTES = 32 * KIB  # kept on either side of a marker
CHUNK_BYTES = 4 * MIB
LONGEST_LINE = 4096  # characters
# What a failure or the start of a run leaves in a log; spelled as it is printed.
MARKERS = (
    b"out of memory", b"DefaultCPUAllocator", b"backward through the graph", b"SIGKILL",
    b"oom-kill", b"collective operation timeout", b"loss: nan", b"loss nan", b"loss is nan",
    b"scripts.base_train", b"no kernel image", b"killed by signal",
)  # fmt: skip
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}
HINT = "python train.py 2>&1 | tee run.log, then snugpt doctor run.log"
_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)?"  # titles, links
    r"|\x1b[PX^_][^\x1b\n]*(?:\x1b\\)?"  # strings meant for the terminal itself
    r"|\x1b[ -/]*[0-~]?"
)
# Control characters but for tab and line end, and those that turn or hide text.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
)
_BREAKS = re.compile(r"\r\n?|\u2028|\u2029|\x85")
_RANK = re.compile(r"^\s*(?:\[\d{1,7}\]\s*)?\[(?:rank|default)(\d{1,5})\]:?\s?")
_ESCAPED_BREAK = re.compile(r"\\r\\n|\\n")
FEW_NULS = 16  # a power cut leaves some
_LARGEST_NUL_SHARE, _LARGEST_ODD_SHARE = 0.01, 0.3

Progress = Callable[[float], None]  # the share that is read


class Line(NamedTuple):
    """One line without its rank's prefix. `rank` is None where the line names none."""

    text: str
    rank: int | None


class LogText(NamedTuple):
    """The kept lines of a log, how large it is, and whether all of it was kept."""

    lines: tuple[Line, ...]
    num_bytes: int
    whole: bool


def read_log(path: Path, progress: Progress = lambda share: None) -> LogText:
    """Return the lines of a log file.

    Raises:
        BadQuestionError: it is not there, can't be read, is empty, or is no text.
    """
    try:
        # A named pipe would wait for a writer, a device has no end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadQuestionError(f"log {str(path)!r} is not a file", hint=HINT)
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            parts = _parts(file, num_bytes, progress)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise BadQuestionError(f"log {str(path)!r} can't be read: {reason}", hint=HINT) from None
    return _text(parts, num_bytes, str(path))


def read_stream(file: BinaryIO) -> LogText:
    """Return the lines of a log that comes through a pipe: its head and its tail.

    Raises:
        BadQuestionError: it is empty, or is no text.
    """
    head, tail, num_bytes = file.read(HEAD_BYTES), bytearray(), 0
    num_bytes = len(head)
    while chunk := file.read(CHUNK_BYTES):
        num_bytes += len(chunk)
        tail += chunk
        del tail[: max(0, len(tail) - TAIL_BYTES)]
    kept_all = num_bytes <= HEAD_BYTES + TAIL_BYTES
    parts = [head + bytes(tail)] if kept_all else [head, bytes(tail)]
    return _text(parts, num_bytes, "standard input")


def _parts(file: BinaryIO, num_bytes: int, progress: Progress) -> list[bytes]:
    """The kept stretches of a file in their order; one where all of it is kept."""
    if num_bytes <= WHOLE_BYTES:
        return [file.read(WHOLE_BYTES)]
    spans = [(0, HEAD_BYTES), (num_bytes - TAIL_BYTES, num_bytes)]
    marked = _marked(file, num_bytes, progress)
    spans += [(max(0, at - WINDOW_BYTES), at + WINDOW_BYTES) for at in marked]
    parts = []
    for start, end in _joined(spans):
        file.seek(start)
        parts.append(file.read(end - start))
    return parts


def _marked(file: BinaryIO, num_bytes: int, progress: Progress) -> set[int]:
    """Where each marker stands first and last between head and tail."""
    first: dict[bytes, int] = {}
    last: dict[bytes, int] = {}
    overlap = max(map(len, MARKERS)) - 1
    start = HEAD_BYTES
    while start < num_bytes - TAIL_BYTES:
        file.seek(start)
        chunk = file.read(CHUNK_BYTES + overlap)
        if not chunk:
            break
        for marker in MARKERS:
            at = chunk.find(marker)
            if at >= 0:
                first.setdefault(marker, start + at)
                last[marker] = start + chunk.rfind(marker)
        start += CHUNK_BYTES
        progress(min(1.0, start / num_bytes))
    return {*first.values(), *last.values()}


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in their order, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def _text(parts: list[bytes], num_bytes: int, name: str) -> LogText:
    for magic, kind in PACKED.items():
        if parts[0].startswith(magic):
            raise BadQuestionError(f"log {name!r} is packed ({kind}); unpack it first", hint=HINT)
    wide = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}.get(parts[0][:2])
    texts = [part.decode(wide or "utf-8", errors="replace") for part in parts]
    if not any(text.strip("\ufeff\0 \t\r\n") for text in texts):
        raise BadQuestionError(f"log {name!r} is empty", hint=HINT)
    if _is_binary(texts[0][: 64 * KIB]):
        raise BadQuestionError(f"log {name!r} is not text", hint=HINT)
    lines = tuple(line for text in texts for line in _lines(text))
    return LogText(lines, num_bytes, whole=len(parts) == 1)


def _is_binary(sample: str) -> bool:
    """Whether a text has the zeros and the broken characters of something that is none."""
    odd = sum(character in "\ufffd\x01\x02\x03\x04\x05\x06\x0e\x0f\x10" for character in sample)
    nuls = sample.count("\0")
    return nuls > max(FEW_NULS, _LARGEST_NUL_SHARE * len(sample)) or odd > _LARGEST_ODD_SHARE * len(
        sample
    )


def _lines(text: str) -> list[Line]:
    found = []
    for raw in _seen(_BREAKS.sub("\n", text)).split("\n"):
        if not raw or raw.isspace():
            continue
        # A log that is written as JSON has a whole traceback in one line.
        pieces = _ESCAPED_BREAK.split(raw) if "Traceback" in raw and "\\n" in raw else (raw,)
        for piece in pieces:
            cut = piece[:LONGEST_LINE].rstrip()
            rank = _RANK.match(cut) if "[rank" in cut or "[default" in cut else None
            found.append(Line(cut[rank.end() :], int(rank[1])) if rank else Line(cut, None))
    return found


def plain(text: str) -> str:
    """Return one line of text without terminal codes and control characters, cut to a length."""
    return _seen(text).replace("\n", " ")[:LONGEST_LINE].rstrip()


def _seen(text: str) -> str:
    """Text without what a terminal would act on; tabs are spaces, lines stay."""
    codeless = _ESCAPES.sub("", text) if "\x1b" in text else text
    return _UNSEEN.sub("", codeless.replace("\t", " "))

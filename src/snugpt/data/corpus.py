"""Corpora: the text a run learns from, measured, named by its content and read as a stream.

Nothing here imports torch, numpy or a tokenizer, so a plan can ask how long a text is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from snugpt.data.builtin import builtin_file
from snugpt.data.documents import BUILTIN_HINT, find_files, read_documents
from snugpt.errors import BadQuestionError, bad_value
from snugpt.units import MIB

BUILTIN = "builtin"

# What `measure_corpus` reads of a corpus at most; a longer one is estimated from its beginnings.
MEASURED_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusMeasure:
    """How long a corpus is. Bytes are of UTF-8 text, without JSON around it."""

    name: str
    num_bytes: int
    num_characters: int
    is_exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Text that has been read once and can be read again, document by document.

    `sha256` is of the documents in order, not of file names: the same text is the same corpus.
    """

    name: str
    files: tuple[Path, ...]
    num_skipped_files: int
    num_documents: int
    num_bytes: int
    num_characters: int
    sha256: str

    def documents(self) -> Iterator[str]:
        """Read the documents again, in the order of `files`."""
        for file in self.files:
            yield from read_documents(file)


def read_corpus(source: str, cache_dir: Path) -> Corpus:
    """Read `source` (a file, a folder or "builtin") once, to count and to name it.

    Raises BadQuestionError on missing, empty, binary or malformed text, naming file and line.
    """
    files, num_skipped_files = _files_of(source, cache_dir)
    digest = hashlib.sha256()
    num_documents = num_bytes = num_characters = 0
    for file in files:
        for document in read_documents(file):
            encoded = document.encode()
            # The length in front keeps "ab","c" and "a","bc" apart.
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
            num_documents += 1
            num_bytes += len(encoded)
            num_characters += len(document)
    if not num_documents:
        raise _empty(source, num_skipped_files)
    return Corpus(
        name=source,
        files=files,
        num_skipped_files=num_skipped_files,
        num_documents=num_documents,
        num_bytes=num_bytes,
        num_characters=num_characters,
        sha256=digest.hexdigest(),
    )


def measure_corpus(source: str, cache_dir: Path) -> CorpusMeasure:
    """Return how long `source` is, in about 0.2 s at most ("builtin" takes 3 s the first time).

    Up to 32 MiB are counted exactly. Of a longer corpus each file's beginning is counted, in
    proportion to its size, and the rest estimated from it (`is_exact` is then False).
    """
    files, num_skipped_files = _files_of(source, cache_dir)
    file_sizes_bytes = [file.stat().st_size for file in files]
    total_bytes = sum(file_sizes_bytes)
    is_exact = total_bytes <= MEASURED_BYTES
    num_bytes = num_characters = 0.0
    for file, size_bytes in zip(files, file_sizes_bytes, strict=True):
        budget = None if is_exact else max(1, MEASURED_BYTES * size_bytes // total_bytes)
        scale = size_bytes / min(size_bytes, budget) if budget and size_bytes else 1.0
        for document in read_documents(file, budget):
            num_bytes += scale * len(document.encode())
            num_characters += scale * len(document)
    if not num_bytes:
        raise _empty(source, num_skipped_files)
    return CorpusMeasure(
        name=source,
        num_bytes=round(num_bytes),
        num_characters=round(num_characters),
        is_exact=is_exact,
    )


def _files_of(source: str, cache_dir: Path) -> tuple[tuple[Path, ...], int]:
    return ((builtin_file(cache_dir),), 0) if source == BUILTIN else find_files(source)


def _empty(source: str, num_skipped_files: int) -> BadQuestionError:
    skipped = f" ({num_skipped_files} binary files left out)" if num_skipped_files else ""
    return bad_value("input", source, f"no text in it{skipped}", hint=BUILTIN_HINT)

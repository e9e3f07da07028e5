"""The split of a corpus into training and validation text: a pure function of the text.

Each document is placed by its own hash, so neither order nor file names matter and a document that
occurs twice is on one side. Where documents are too few or too uneven for that (one long file, say)
the last part of each document is validation.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

VALIDATION_SHARE = 0.05

# Splitting by documents may take up to this many times the text that was asked for.
_MAX_OVERSHOOT = 2.0

SplitName = Literal["train", "validation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Where validation begins: at a document hash, or at a share of each document's length.

    Exactly one is set. A document is validation if its hash is at most `last_validation_hash`;
    with `tail_share` the last such part of every document is.
    """

    last_validation_hash: int | None = None
    tail_share: float | None = None

    def parts(self, document: str) -> Iterator[tuple[SplitName, str]]:
        """Yield (side, text) of a document: one pair, or two where its tail is split off."""
        if self.tail_share is None:
            assert self.last_validation_hash is not None
            is_validation = document_hash(document) <= self.last_validation_hash
            yield ("validation" if is_validation else "train"), document
            return
        cut = len(document) - math.ceil(len(document) * self.tail_share)
        if cut:
            yield "train", document[:cut]
        yield "validation", document[cut:]


def validation_bytes(num_corpus_bytes: int, num_row_bytes: int) -> int:
    """Return how much text validation gets: 5 %, at least one row, at most half."""
    wanted = max(math.ceil(num_corpus_bytes * VALIDATION_SHARE), num_row_bytes)
    return min(wanted, num_corpus_bytes // 2)


def choose_split(documents: Iterable[str], num_validation_bytes: int) -> Split:
    """Return the split that gives validation at least `num_validation_bytes` of text.

    The documents with the smallest hashes are taken until there is enough. If that takes more than
    twice as much, each document gives its tail instead.
    """
    hashes, sizes = array("Q"), array("Q")
    for document in documents:
        hashes.append(document_hash(document))
        sizes.append(len(document.encode()))
    hash_of, size_of = np.frombuffer(hashes, np.uint64), np.frombuffer(sizes, np.uint64)
    total_bytes = int(size_of.sum())
    by_hash = np.argsort(hash_of, kind="stable")
    taken_bytes = np.cumsum(size_of[by_hash])
    last = min(int(np.searchsorted(taken_bytes, num_validation_bytes)), len(by_hash) - 1)
    threshold = hash_of[by_hash[last]]
    # Counted by the threshold itself, since equal documents have equal hashes.
    chosen_bytes = int(size_of[hash_of <= threshold].sum())
    if chosen_bytes <= _MAX_OVERSHOOT * num_validation_bytes and chosen_bytes < total_bytes:
        return Split(last_validation_hash=int(threshold))
    return Split(tail_share=num_validation_bytes / total_bytes)


def document_hash(document: str) -> int:
    """Return 64 bits that stand for a document's text."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "little")

"""From text to token shards: read, split, train the tokenizer, encode; done once per content.

    <cache_dir>/corpora/                  the built-in corpus
    <cache_dir>/prepared/<identity>/      tokenizer.json, both .bin and their indexes
    <cache_dir>/prepared/<asked>.sha256   which tokenizer came out of training one for this text

The identity stands for the text, the split and the tokenizer's content, so that a run that comes
back with its own tokenizer finds what was encoded when that tokenizer was trained. Prepared data
that turn out damaged are made again: they are a cache, and making them again gives the same bytes.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from snugpt.data.corpus import Corpus, read_corpus
from snugpt.data.documents import BUILTIN_HINT
from snugpt.data.durable_file import write_durably
from snugpt.data.shards import TokenShard, open_shard, shard_writer
from snugpt.data.split import Split, SplitName, choose_split, validation_bytes
from snugpt.data.tokenizer import Tokenizer, byte_tokenizer, split_pieces, train_tokenizer
from snugpt.errors import FailedError, bad_value
from snugpt.units import MIB

#: (what is being done, share done from 0 to 1)
Progress = Callable[[str, float], None]

TOKENIZER_FILE = "tokenizer.json"
_SIDES: tuple[SplitName, ...] = ("train", "validation")

# Part of the identity: raised whenever the same text would give other tokens.
_PREPARATION_VERSION = 1

# A BPE learns its few thousand merges from far less than a large corpus; of more text than this an
# even sample is taken.
_TOKENIZER_SAMPLE_BYTES = 64 * MIB

# Validation must hold a row of tokens before their number is known. English takes 4 to 5 bytes per
# token, source code up to 8.
_BYTES_PER_BPE_TOKEN = 8

_SMALLEST_HINTED_SEQ_LEN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """All a run needs to know of its text."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: TokenShard
    validation: TokenShard
    folder: Path


def prepare(
    source: str,
    *,
    vocab_size: int | Literal["byte"],
    seq_len: int,
    cache_dir: Path,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Return token shards and tokenizer for `source` (a file, a folder or "builtin").

    A BPE of `vocab_size` entries is trained on the training text, unless `vocab_size` is "byte" or
    a `tokenizer` is given (then `vocab_size` is not used). `seq_len` [tokens] says how long a row
    is: both sides of the split must hold one.
    Raises BadQuestionError for text that won't do and FailedError if the disk fails.
    """
    report = progress or _ignore
    report("reading", 0.0)
    corpus = read_corpus(source, cache_dir)
    if vocab_size == "byte" and tokenizer is None:
        tokenizer = byte_tokenizer()
    is_byte = tokenizer is not None and tokenizer.is_byte
    row_bytes = (seq_len + 1) * (1 if is_byte else _BYTES_PER_BPE_TOKEN)
    num_validation_bytes = validation_bytes(corpus.num_bytes, row_bytes)

    def place(encoding: str) -> Path:
        content = f"{_PREPARATION_VERSION} {corpus.sha256} {num_validation_bytes} {encoding}"
        return cache_dir / "prepared" / hashlib.sha256(content.encode()).hexdigest()[:24]

    asked = place(f"bpe {vocab_size} {_TOKENIZER_SAMPLE_BYTES}").with_suffix(".sha256")
    known_sha256 = tokenizer.sha256 if tokenizer else _read_name(asked)
    data = _cached(corpus, known_sha256, place(known_sha256)) if known_sha256 else None
    if data is None:
        split = choose_split(corpus.documents(), num_validation_bytes)
        if tokenizer is None:
            assert vocab_size != "byte"
            tokenizer = _train(corpus, split, vocab_size, report)
            write_durably(asked, tokenizer.sha256.encode())
        folder = place(tokenizer.sha256)
        data = _cached(corpus, tokenizer.sha256, folder)
        if data is None:
            _encode(corpus, split, tokenizer, folder, report)
            data = _open(corpus, tokenizer.sha256, folder)
    _refuse_short(data, seq_len)
    return data


def _train(corpus: Corpus, split: Split, vocab_size: int, report: Progress) -> Tokenizer:
    report("training the tokenizer", 0.0)
    sample = _even_sample(_side(corpus, split, "train"), corpus.num_bytes)
    return train_tokenizer(sample, vocab_size)


def _even_sample(texts: Iterator[str], num_bytes: int) -> Iterator[str]:
    """Yield all of the texts, or pieces from everywhere in them that make up the sample."""
    share = min(1.0, _TOKENIZER_SAMPLE_BYTES / num_bytes)
    seen = taken = 0
    for text in texts:
        for piece in split_pieces(text):
            if taken <= seen * share:
                taken += len(piece)
                yield piece
            seen += len(piece)


def _encode(
    corpus: Corpus, split: Split, tokenizer: Tokenizer, folder: Path, report: Progress
) -> None:
    """Write the tokenizer and both shards; each side reads the corpus once."""
    tokenizer.save(folder / TOKENIZER_FILE)
    num_read_bytes = 0

    def counted(texts: Iterator[str]) -> Iterator[str]:
        nonlocal num_read_bytes
        for text in texts:
            yield text
            num_read_bytes += len(text.encode())
            report("encoding", min(1.0, num_read_bytes / corpus.num_bytes))

    for name in _SIDES:
        with shard_writer(folder, name, tokenizer, corpus.sha256) as writer:
            for block in tokenizer.encode_stream(counted(_side(corpus, split, name))):
                writer.append(block)
            if name == _SIDES[-1] and num_read_bytes != corpus.num_bytes:
                raise FailedError(f"input {corpus.name!r} changed while it was read")


def _side(corpus: Corpus, split: Split, side: SplitName) -> Iterator[str]:
    for document in corpus.documents():
        for name, text in split.parts(document):
            if name == side:
                yield text


def _read_name(file: Path) -> str | None:
    """The sha256 of a tokenizer; damaged it names no data, and they are made again."""
    try:
        return file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None


def _cached(corpus: Corpus, tokenizer_sha256: str, folder: Path) -> PreparedData | None:
    if not folder.is_dir():
        return None
    try:
        return _open(corpus, tokenizer_sha256, folder)
    except FailedError:
        return None


def _open(corpus: Corpus, tokenizer_sha256: str, folder: Path) -> PreparedData:
    train, validation = (open_shard(folder, name) for name in _SIDES)
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE, expected_sha256=tokenizer_sha256)
    for shard in (train, validation):
        made_of = (shard.index.corpus_sha256, shard.index.tokenizer_sha256)
        if made_of != (corpus.sha256, tokenizer_sha256):
            raise FailedError(
                f"{folder} was made of another text or tokenizer", hint=f"rm -r {folder}"
            )
    return PreparedData(
        corpus=corpus, tokenizer=tokenizer, train=train, validation=validation, folder=folder
    )


def _refuse_short(data: PreparedData, seq_len: int) -> None:
    found = data.train.num_tokens, data.validation.num_tokens
    if min(found) > seq_len:
        return
    reason = (
        f"{found[0]} tokens to train on and {found[1]} to validate on; "
        f"seq_len = {seq_len} needs {seq_len + 1} of each"
    )
    # Powers of two are what people type; one that fits this text is the nearer way out.
    fitting = 1 << max(0, (min(found) - 1).bit_length() - 1)
    name = data.corpus.name
    hint = f"snugpt train --input {shlex.quote(name)} --seq-len {fitting}"
    raise bad_value(
        "input", name, reason, hint=hint if fitting >= _SMALLEST_HINTED_SEQ_LEN else BUILTIN_HINT
    )


def _ignore(_doing: str, _share: float) -> None:
    pass

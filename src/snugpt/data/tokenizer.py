"""The tokenizer: byte-level BPE trained on the user's text, or plain bytes; one class for both.

Both are stored as a standard `tokenizer.json`, which Hugging Face, vLLM and llama.cpp's converter
read. The byte tokenizer is a BPE without merges whose ids are the byte values. Any text can be
encoded, and decoding gives back the same text.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Encoder

from snugpt.data.durable_file import write_durably
from snugpt.errors import BadQuestionError, FailedError, bad_value

END_OF_TEXT = "<|endoftext|>"
NUM_BYTE_VALUES = 256
SMALLEST_BPE_VOCAB_SIZE = NUM_BYTE_VALUES + 1

# GPT-4's split pattern (openai/tiktoken, cl100k_base), with numbers in groups of at most two digits
# instead of three, as nanochat has it: three waste entries of a small vocabulary.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Long documents are encoded in pieces, several at a time on all cores.
_PIECE_CHARACTERS = 32_768
_PIECES_PER_BATCH = 64
# No token crosses from a new line to a visible character: every alternative of the pattern that can
# match a new line ends there. So the pieces' tokens are the document's tokens.
_PIECE_END = re.compile(r"\n(?=[!-~])")


class Tokenizer:
    """Text to token ids and back. Made by `train_tokenizer`, `byte_tokenizer` or `load`."""

    def __init__(self, encoder: Encoder) -> None:
        # Text that spells "<|endoftext|>" is text: only we place separators.
        encoder.encode_special_tokens = True
        self._encoder = encoder
        self._bytes_of, specials = _bytes_by_id(encoder)
        self._end_of_text = specials.get(END_OF_TEXT)
        self._is_byte = len(self._bytes_of) == NUM_BYTE_VALUES and all(
            content == bytes([token_id]) for token_id, content in enumerate(self._bytes_of)
        )
        #: UTF-8 bytes each token id stands for, 0 for special ones; (vocab_size,) int64.
        self.token_bytes = np.array([len(content) for content in self._bytes_of], np.int64)
        self.token_bytes[list(specials.values())] = 0
        self.token_bytes.flags.writeable = False

    @property
    def vocab_size(self) -> int:
        """Number of entries; a model's rows beyond it are padding."""
        return len(self._bytes_of)

    @property
    def is_byte(self) -> bool:
        """Whether the ids are the byte values."""
        return self._is_byte

    @property
    def end_of_text_id(self) -> int | None:
        """Id of the token in front of each document; None for the byte tokenizer."""
        return self._end_of_text

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Smallest little-endian type that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def sha256(self) -> str:
        """Identity: equal exactly where encoding is equal, whatever wrote the file."""
        content = json.loads(self._encoder.to_str())
        parts = ("added_tokens", "normalizer", "pre_tokenizer", "model")
        canonical = json.dumps({part: content[part] for part in parts}, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without separators.

        Raises BadQuestionError if the text holds a lone surrogate, which UTF-8 can't.
        """
        try:
            content = text.encode()
        except UnicodeEncodeError as error:
            reason = f"a lone surrogate at character {error.start} is not text"
            raise bad_value("text", text[error.start : error.end], reason) from error
        if self._is_byte:
            return list(content)
        return list(self._encoder.encode(text, add_special_tokens=False).ids)

    def encode_stream(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of many documents in blocks, separators included.

        "<|endoftext|>" stands before each document; the byte tokenizer has a new line between two.
        """
        texts = self._separated_pieces(documents)
        while batch := list(islice(texts, _PIECES_PER_BATCH)):
            yield np.concatenate([np.asarray(ids, self.dtype) for ids in self._encode_batch(batch)])

    def encode_documents(self, documents: Iterable[str]) -> np.ndarray:
        """Return the ids of many documents as one array, separators included."""
        blocks = list(self.encode_stream(documents))
        return np.concatenate(blocks) if blocks else np.empty(0, self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of one token; none for a padding row of the model."""
        return self._bytes_of[token_id] if 0 <= token_id < len(self._bytes_of) else b""

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder that is fed token by token."""
        return StreamDecoder(self)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`, whole or not at all."""
        write_durably(path, self._encoder.to_str(pretty=True).encode())

    @classmethod
    def load(cls, path: Path, *, expected_sha256: str | None = None) -> Tokenizer:
        """Read a `tokenizer.json`; raises FailedError if missing, damaged or not the one expected.

        Pass the identity kept elsewhere (shard index, checkpoint): the file has no checksum.
        """
        try:
            tokenizer = cls(Encoder.from_str(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise FailedError(f"can't read {path}: {error.strerror or error}") from error
        except Exception as error:  # the library raises plain Exception for whatever it dislikes
            reason = " ".join(str(error).split())
            raise _damaged(path, reason or type(error).__name__) from error
        if expected_sha256 is not None and tokenizer.sha256 != expected_sha256:
            raise _damaged(path, f"its sha256 is not {expected_sha256[:12]}…")
        return tokenizer

    def _separated_pieces(self, documents: Iterable[str]) -> Iterator[str | None]:
        # None stands for the separator token.
        for number, document in enumerate(documents):
            if self._end_of_text is not None:
                yield None
            elif number:
                yield "\n"
            yield from split_pieces(document)

    def _encode_batch(self, batch: Sequence[str | None]) -> Iterator[Sequence[int] | np.ndarray]:
        if self._is_byte:
            yield from (np.frombuffer((text or "").encode(), np.uint8) for text in batch)
            return
        texts = [text for text in batch if text is not None]
        encodings = iter(self._encoder.encode_batch_fast(texts, add_special_tokens=False))
        for text in batch:
            yield [self._end_of_text or 0] if text is None else next(encodings).ids


class StreamDecoder:
    """Text from tokens as they come: what is given out is whole UTF-8, each byte decoded once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """Return the text that this token completes, perhaps none."""
        return self._decoder.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        """Return U+FFFD for an unfinished character, if there is one."""
        return self._decoder.decode(b"", final=True)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` entries, or fewer if the text repeats no more pairs.

    The result depends on the text alone. Raises BadQuestionError below 257 entries.
    """
    if vocab_size < SMALLEST_BPE_VOCAB_SIZE:
        raise _small_vocabulary(vocab_size)
    encoder = Encoder(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    encoder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair that occurs once shortens nothing
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    encoder.train_from_iterator(
        (piece for text in documents for piece in split_pieces(text)), trainer
    )
    return Tokenizer(encoder)


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose 256 ids are the byte values; it has no special token."""
    vocabulary = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
    encoder = Encoder(models.BPE(vocab=vocabulary, merges=[]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.decoder = decoders.ByteLevel()
    return Tokenizer(encoder)


def split_pieces(text: str) -> Iterator[str]:
    """Cut a long text where no token can cross; a text without such a place stays whole."""
    start = 0
    while end := _PIECE_END.search(text, start + _PIECE_CHARACTERS):
        yield text[start : end.end()]
        start = end.end()
    if start < len(text):
        yield text[start:]


def _letters_of_bytes() -> list[str]:
    """Return the printable character by which GPT-2's byte-level BPE writes each byte.

    Visible Latin-1 characters stand for themselves, the rest follow from U+0100 on
    (openai/gpt-2, src/encoder.py, bytes_to_unicode).
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    substitutes = map(chr, range(NUM_BYTE_VALUES, 2 * NUM_BYTE_VALUES))
    return [chr(b) if b in visible else next(substitutes) for b in range(NUM_BYTE_VALUES)]


def _bytes_by_id(encoder: Encoder) -> tuple[list[bytes], dict[str, int]]:
    """Return the bytes of each id and the ids of special tokens; ValueError if not byte-level."""
    byte_of = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
    added = {
        token.content: token_id for token_id, token in encoder.get_added_tokens_decoder().items()
    }
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    missing = [byte for letter, byte in byte_of.items() if letter not in vocabulary]
    if missing:
        raise ValueError(f"no token for byte {missing[0]}: not a byte-level BPE")
    contents = [b""] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        is_added = token in added
        contents[token_id] = token.encode() if is_added else bytes(byte_of[c] for c in token)
    return contents, added


def _small_vocabulary(vocab_size: int) -> BadQuestionError:
    reason = f"at least {SMALLEST_BPE_VOCAB_SIZE} (256 bytes and {END_OF_TEXT})"
    return bad_value("vocab_size", vocab_size, reason, hint="--vocab-size 2048")


def _damaged(path: Path, reason: str) -> FailedError:
    return FailedError(
        f"{path} is damaged or not a tokenizer of ours: {reason}",
        hint=f"rm {shlex.quote(str(path))}",
    )

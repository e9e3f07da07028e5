"""Text survives encoding, bytes are accounted for, and damage is noticed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snugpt.data import tokenizer as tokenizer_module
from snugpt.data.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    byte_tokenizer,
    split_pieces,
    train_tokenizer,
)
from snugpt.errors import BadQuestionError, FailedError

TRAINING_TEXT = (
    Path(__file__).parent / "test_loader.py"
).read_text() + "Ein Käse für 12345 €. " * 9
KINDS = ("bpe", "byte")

texts = st.text(st.characters(codec="utf-8")) | st.text("a'\n\r \t1ä€.<|>s\u2028\x1c")


@cache
def _tokenizer(kind: str) -> Tokenizer:
    return byte_tokenizer() if kind == "byte" else train_tokenizer([TRAINING_TEXT], 400)


@pytest.mark.parametrize("kind", KINDS)
@given(texts)
def test_decoding_gives_back_the_text(kind: str, text: str) -> None:
    tokenizer = _tokenizer(kind)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@given(texts)
def test_token_bytes_add_up_to_the_text(kind: str, text: str) -> None:
    tokenizer = _tokenizer(kind)
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.integers(0, 420)))
def test_streamed_text_equals_decoded_text(kind: str, ids: list[int]) -> None:
    tokenizer = _tokenizer(kind)
    stream = tokenizer.stream_decoder()
    assert "".join(map(stream.feed, ids)) + stream.finish() == tokenizer.decode(ids)


def test_stream_holds_back_unfinished_characters() -> None:
    stream = byte_tokenizer().stream_decoder()
    assert [stream.feed(byte) for byte in "a€".encode()] == ["a", "", "", "€"]
    assert stream.feed(0xE2) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


@given(st.text("ab1 \n\r\t'.!ä\u2028\x1c", min_size=20))
def test_pieces_have_the_tokens_of_the_whole(text: str) -> None:
    tokenizer = _tokenizer("bpe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PIECE_CHARACTERS", 2)
        pieces = list(split_pieces(text))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_vocabulary_has_the_size_asked_for() -> None:
    assert _tokenizer("bpe").vocab_size == 400
    assert len(_tokenizer("bpe").token_bytes) == 400


def test_short_text_gives_fewer_entries() -> None:
    assert train_tokenizer(["ab ab"], 10_000).vocab_size < 270


def test_training_depends_on_the_text_alone() -> None:
    again = train_tokenizer([TRAINING_TEXT], 400)
    assert again.sha256 == _tokenizer("bpe").sha256
    assert again.sha256 != train_tokenizer([TRAINING_TEXT], 401).sha256


@pytest.mark.parametrize("vocab_size", [-1, 0, 256])
def test_vocabulary_without_room_for_bytes_is_refused(vocab_size: int) -> None:
    with pytest.raises(BadQuestionError, match=f"vocab_size = {vocab_size} .* at least 257"):
        train_tokenizer(["text"], vocab_size)


def test_byte_ids_are_byte_values() -> None:
    tokenizer = byte_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.is_byte, tokenizer.end_of_text_id) == (256, True, None)
    assert tokenizer.encode("aä\n") == list("aä\n".encode())


def test_separator_stands_before_each_document() -> None:
    tokenizer = _tokenizer("bpe")
    ids = tokenizer.encode_documents(["eins", "zwei"])
    assert tokenizer.end_of_text_id == 0
    assert ids.tolist() == [0, *tokenizer.encode("eins"), 0, *tokenizer.encode("zwei")]
    assert ids.dtype == np.dtype("<u2")
    assert tokenizer.token_bytes[ids].sum() == len("einszwei")


def test_bytes_have_a_new_line_between_documents() -> None:
    ids = byte_tokenizer().encode_documents(["eins", "zwei"])
    assert bytes(ids.tolist()) == b"eins\nzwei"


def test_no_documents_give_no_tokens() -> None:
    assert _tokenizer("bpe").encode_documents([]).tolist() == []


def test_text_that_spells_the_separator_stays_text() -> None:
    tokenizer = _tokenizer("bpe")
    assert 0 not in tokenizer.encode(END_OF_TEXT)
    assert 0 not in tokenizer.encode_documents([END_OF_TEXT])[1:]
    assert tokenizer.decode([0]) == END_OF_TEXT


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(BadQuestionError, match="lone surrogate at character 1"):
        _tokenizer("bpe").encode("a\udcff")


def test_id_of_a_padding_row_decodes_to_nothing() -> None:
    assert _tokenizer("bpe").decode([400, 10**6, -1]) == ""


def test_large_vocabulary_needs_wider_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(tokenizer, "_bytes_of", [b"x"] * 65_537)
    assert tokenizer.dtype == np.dtype("<u4")


@pytest.mark.parametrize("kind", KINDS)
def test_file_loads_back_to_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer, path = _tokenizer(kind), tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path, expected_sha256=tokenizer.sha256)
    assert loaded.encode("Käse 12") == tokenizer.encode("Käse 12")
    assert loaded.is_byte == tokenizer.is_byte
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_file_is_read_by_the_standard_library_of_tokenizers(tmp_path: Path) -> None:
    import tokenizers

    path = tmp_path / "tokenizer.json"
    _tokenizer("bpe").save(path)
    standard = tokenizers.Tokenizer.from_file(str(path))
    ids = standard.encode(TRAINING_TEXT).ids
    assert ids == _tokenizer("bpe").encode(TRAINING_TEXT)
    assert standard.decode(ids) == TRAINING_TEXT


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0"', b"\xff\xfe", b"{}", b"[]"])
def test_damaged_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(FailedError, match=r"tokenizer\.json is damaged") as caught:
        Tokenizer.load(path)
    assert "\n" not in caught.value.message


def test_tokenizer_without_all_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(path)
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(FailedError, match="no token for byte 97"):
        Tokenizer.load(path)


def test_other_tokenizer_than_expected_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(path)
    with pytest.raises(FailedError, match="its sha256 is not"):
        Tokenizer.load(path, expected_sha256=_tokenizer("bpe").sha256)


def test_missing_file_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(FailedError, match="can't read"):
        Tokenizer.load(tmp_path / "tokenizer.json")

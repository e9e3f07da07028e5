"""From text to shards, once per content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from snugpt.data import prepare as prepare_module
from snugpt.data.prepare import PreparedData, prepare
from snugpt.data.tokenizer import Tokenizer, byte_tokenizer
from snugpt.errors import BadQuestionError, FailedError

SEQ_LEN = 16
TEXT = "".join(f"Sentence number {n} says that {n} is not {n + 1}.\n" for n in range(400))


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def _prepare(source: str, tmp_path: Path, **changes) -> PreparedData:
    arguments = {"vocab_size": 300, "seq_len": SEQ_LEN, "cache_dir": tmp_path / "cache"}
    return prepare(source, **(arguments | changes))


def test_shards_hold_the_text(source: str, tmp_path: Path) -> None:
    data = _prepare(source, tmp_path)
    train, validation = (
        data.tokenizer.decode(shard.tokens[1:].tolist()) for shard in (data.train, data.validation)
    )
    assert train + validation == TEXT
    assert len(validation) == pytest.approx(0.05 * len(TEXT), rel=0.01)
    assert data.train.index.num_text_bytes == len(train)
    assert data.tokenizer.vocab_size == 300


def test_bytes_are_kept_as_they_are(source: str, tmp_path: Path) -> None:
    data = _prepare(source, tmp_path, vocab_size="byte")
    ids = np.concatenate([data.train.tokens, data.validation.tokens])
    assert bytes(ids.astype(np.uint8)) == TEXT.encode()


def test_tokenizer_of_a_model_can_be_given(source: str, tmp_path: Path) -> None:
    first = _prepare(source, tmp_path)
    (tmp_path / "other.txt").write_text(TEXT.upper())
    second = _prepare(str(tmp_path / "other.txt"), tmp_path, tokenizer=first.tokenizer)
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    assert second.folder != first.folder


def test_second_time_encodes_nothing(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _prepare(source, tmp_path)
    monkeypatch.setattr(prepare_module, "_encode", None)
    second = _prepare(source, tmp_path)
    assert second.train.index == first.train.index


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that text was encoded into, in order."""
    folders: list[Path] = []
    encode = prepare_module._encode

    def counted(corpus, split, tokenizer, folder, report) -> None:
        folders.append(folder)
        encode(corpus, split, tokenizer, folder, report)

    monkeypatch.setattr(prepare_module, "_encode", counted)
    return folders


def test_the_tokenizer_of_a_run_finds_what_was_encoded_when_it_was_trained(
    source: str, tmp_path: Path, encoded: list[Path]
) -> None:
    first = _prepare(source, tmp_path)
    first.tokenizer.save(tmp_path / "run" / "tokenizer.json")
    own = Tokenizer.load(tmp_path / "run" / "tokenizer.json")
    resumed = _prepare(source, tmp_path, tokenizer=own)
    assert encoded == [first.folder] == [resumed.folder]
    assert resumed.train.index == first.train.index
    assert resumed.validation.index == first.validation.index


def test_what_was_encoded_with_a_given_tokenizer_is_there_for_who_trains_the_same(
    source: str, tmp_path: Path, encoded: list[Path]
) -> None:
    tokenizer = _prepare(source, tmp_path / "elsewhere").tokenizer
    given = _prepare(source, tmp_path, tokenizer=tokenizer)
    trained = _prepare(source, tmp_path)
    assert trained.folder == given.folder
    assert len(encoded) == 2  # one of them elsewhere


def test_what_is_asked_for_differently_never_shares_data(
    source: str, tmp_path: Path, encoded: list[Path]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("Sentence", "Sentense"))
    tokenizer = _prepare(str(other), tmp_path, vocab_size=290).tokenizer
    asked = [
        {},
        {"vocab_size": 301},
        {"vocab_size": "byte"},
        {"seq_len": 500},
        {"tokenizer": tokenizer},
        {"tokenizer": byte_tokenizer(), "seq_len": 2000},
    ]
    folders = [_prepare(source, tmp_path, **changes).folder for changes in asked]
    folders.append(_prepare(str(other), tmp_path).folder)
    assert len(set(folders)) == len(asked) + 1
    assert encoded[1:] == folders


@pytest.mark.parametrize("content", [b"", b"?", b"\xff", b"0" * 64])
def test_a_damaged_note_of_the_trained_tokenizer_costs_a_training_only(
    source: str, tmp_path: Path, encoded: list[Path], content: bytes
) -> None:
    first = _prepare(source, tmp_path)
    (note,) = first.folder.parent.glob("*.sha256")
    before = note.read_bytes()
    note.write_bytes(content)
    assert _prepare(source, tmp_path).folder == first.folder
    assert note.read_bytes() == before
    assert len(encoded) == 1


def test_changed_text_is_prepared_again(source: str, tmp_path: Path) -> None:
    first = _prepare(source, tmp_path)
    Path(source).write_text(TEXT + "One more.")
    second = _prepare(source, tmp_path)
    assert second.folder != first.folder
    assert second.validation.index.tokens_sha256 != first.validation.index.tokens_sha256


@pytest.mark.parametrize(
    "name", ["train.bin", "validation.bin", "train.index.json", "tokenizer.json"]
)
def test_damaged_cache_is_made_again(source: str, tmp_path: Path, name: str) -> None:
    first = _prepare(source, tmp_path)
    path = first.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"?" + content[101:])
    second = _prepare(source, tmp_path)
    assert second.train.index == first.train.index
    assert path.read_bytes() == content


def test_cached_tokenizer_that_is_another_one_is_made_again(source: str, tmp_path: Path) -> None:
    first = _prepare(source, tmp_path)
    byte_tokenizer().save(first.folder / "tokenizer.json")
    assert _prepare(source, tmp_path).tokenizer.sha256 == first.tokenizer.sha256


def test_longer_rows_get_the_validation_text_they_need(source: str, tmp_path: Path) -> None:
    first = _prepare(source, tmp_path)
    longer = _prepare(source, tmp_path, seq_len=500)
    assert longer.folder != first.folder
    assert longer.validation.num_tokens > 500 > first.validation.num_tokens


def test_corpus_shorter_than_a_row_says_what_is_needed(source: str, tmp_path: Path) -> None:
    with pytest.raises(BadQuestionError) as caught:
        _prepare(source, tmp_path, seq_len=100_000)
    assert caught.value.message.startswith(f"input = {source!r} is not allowed: ")
    assert "seq_len = 100000 needs 100001 of each" in caught.value.message
    assert caught.value.hint is not None
    fitting = int(caught.value.hint.removeprefix(f"snugpt train --input {source} --seq-len "))
    assert _prepare(source, tmp_path, seq_len=fitting).validation.num_tokens > fitting


def test_corpus_of_a_few_words_hints_the_built_in_one(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("Hi.")
    with pytest.raises(BadQuestionError) as caught:
        _prepare(str(tmp_path / "few.txt"), tmp_path)
    assert caught.value.hint == "snugpt train --input builtin"


@pytest.mark.parametrize("seq_len", [1, 16, 500])
def test_validation_has_a_row_even_of_a_short_corpus(
    source: str, tmp_path: Path, seq_len: int
) -> None:
    data = _prepare(source, tmp_path, seq_len=seq_len)
    assert data.validation.num_tokens > seq_len


def test_full_disk_leaves_no_half_shard(source: str, tmp_path: Path, largest_file_bytes) -> None:
    with largest_file_bytes(5_000), pytest.raises(FailedError, match="could not write"):
        _prepare(source, tmp_path, vocab_size="byte", tokenizer=byte_tokenizer())
    assert not list((tmp_path / "cache").rglob("*.partial"))
    assert not list((tmp_path / "cache").rglob("*.bin"))
    assert _prepare(source, tmp_path, vocab_size="byte").train.num_tokens


def test_text_that_changes_meanwhile_is_noticed(source: str, tmp_path: Path) -> None:
    def meddle(doing: str, share: float) -> None:
        if doing == "training the tokenizer":
            Path(source).write_text(TEXT + "more")

    with pytest.raises(FailedError, match="changed while it was read"):
        _prepare(source, tmp_path, progress=meddle)


def test_large_corpus_gives_the_tokenizer_an_even_sample(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_TOKENIZER_SAMPLE_BYTES", 1_000)
    texts = [f"{n:04d}" * 10 for n in range(1_000)]
    sample = list(prepare_module._even_sample(iter(texts), 40_000))
    assert len("".join(sample)) == pytest.approx(1_000, abs=40)
    assert [int(text[:4]) for text in sample] == list(range(0, 1_000, 40))


def test_progress_goes_from_reading_to_done(source: str, tmp_path: Path) -> None:
    reports: list[tuple[str, float]] = []
    _prepare(source, tmp_path, progress=lambda doing, share: reports.append((doing, share)))
    assert list(dict(reports)) == ["reading", "training the tokenizer", "encoding"]
    assert reports[-1] == ("encoding", 1.0)

"""A corpus is counted, named by its content, and measured cheaply."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from snugpt.data import corpus as corpus_module
from snugpt.data.corpus import measure_corpus, read_corpus
from snugpt.errors import BadQuestionError


def test_counts_are_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\u00e4b"}\n{"text": "c"}\n')
    corpus = read_corpus(str(tmp_path), tmp_path)
    assert (corpus.num_documents, corpus.num_bytes, corpus.num_characters) == (2, 4, 3)
    measure = measure_corpus(str(tmp_path), tmp_path)
    assert (measure.num_bytes, measure.num_characters, measure.is_exact) == (4, 3, True)


def test_identity_is_of_the_text_not_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("eins")
    (tmp_path / "one" / "b.txt").write_text("zwei")
    (tmp_path / "two.jsonl").write_text('{"text": "eins"}\n{"text": "zwei"}\n')
    (tmp_path / "three.jsonl").write_text('{"text": "einsz"}\n{"text": "wei"}\n')
    sources = [str(tmp_path / name) for name in ("one", "two.jsonl", "three.jsonl")]
    one, two, three = (read_corpus(source, tmp_path).sha256 for source in sources)
    assert one == two != three


def test_documents_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("eins")
    corpus = read_corpus(str(tmp_path / "a.txt"), tmp_path)
    assert list(corpus.documents()) == list(corpus.documents()) == ["eins"]


@pytest.mark.parametrize("read", [read_corpus, measure_corpus])
def test_empty_corpus_is_refused(tmp_path: Path, read) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.png").write_bytes(b"\0")
    with pytest.raises(BadQuestionError, match=r"no text in it \(1 binary files left out\)"):
        read(str(tmp_path), tmp_path)


def test_long_corpus_is_estimated_from_its_beginnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "MEASURED_BYTES", 10_000)
    (tmp_path / "a.txt").write_text("käse " * 5_000)
    (tmp_path / "b.jsonl").write_text('{"text": "0123456789"}\n' * 3_000)
    measure = measure_corpus(str(tmp_path), tmp_path)
    exact = read_corpus(str(tmp_path), tmp_path)
    assert not measure.is_exact
    assert measure.num_bytes == pytest.approx(exact.num_bytes, rel=0.01)
    assert measure.num_characters == pytest.approx(exact.num_characters, rel=0.01)


def test_measuring_imports_neither_torch_nor_numpy_nor_tokenizers() -> None:
    program = (
        "import sys, snugpt.data.corpus;"
        "print({'torch', 'numpy', 'tokenizers'} & set(sys.modules) or 'none')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == "none\n"

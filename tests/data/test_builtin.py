"""The built-in corpus: enough English, the same every time, no text twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from snugpt.data import builtin
from snugpt.data.builtin import builtin_documents, builtin_file
from snugpt.data.corpus import read_corpus


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of four modules, so that tests need not parse the real one."""
    root = tmp_path / "library"
    sources = {
        "b.py": '"""B."""\nclass C:\n    """Of C."""\n    def f(self):\n        """Of f."""\n',
        "a.py": '"""B."""\ndef g():\n    """Of g.\n\n    Indented.\n    """\n',
        "bad.py": "def :\n",
        "old.py": '"""Escape \\d."""\n"\\d"\n',
        "surrogate.py": '"""\\ud800"""\n',
        "test/t.py": '"""Not this."""\n',
        "idlelib/i.py": '"""Nor this."""\n',
    }
    for name, source in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    monkeypatch.setattr(builtin, "_topics", lambda: [["Topic."]])
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda _name: str(root))
    return root


def test_documents_are_sorted_and_no_text_comes_twice(library: Path) -> None:
    assert list(builtin_documents(library)) == [
        "Topic.\n",
        "B.\n\nOf g.\n\nIndented.\n",
        "Of C.\n\nOf f.\n",
        "Escape \\d.\n",
    ]


def test_extraction_is_cached(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = builtin_file(tmp_path)
    monkeypatch.setattr(builtin, "builtin_documents", None)
    assert builtin_file(tmp_path) == first


def test_damaged_cache_is_made_anew(library: Path, tmp_path: Path) -> None:
    path = builtin_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Topic", b"Tropic"))
    assert builtin_file(tmp_path).read_bytes() == content


def test_this_python_has_about_two_megabytes(tmp_path: Path) -> None:
    corpus = read_corpus("builtin", tmp_path)
    assert 1_000_000 < corpus.num_bytes < 4_000_000
    assert corpus.num_documents > 300

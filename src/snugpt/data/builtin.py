"""The built-in corpus: about 2 MB of English that every Python already has, nothing to download.

It is the language reference of `pydoc_data.topics` and the docstrings of the standard library, read
from its source files. Both are under the PSF licence. The text differs between Python versions, so
a run records the corpus by its sha256.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from snugpt.data.durable_file import write_durably

# Tests and other people's packages are not the library; IDLE's and 2to3's docstrings say little.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
)

# Part of the cached file's name: raised whenever the extraction below changes what it yields.
_EXTRACTION_VERSION = 1

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def builtin_file(cache_dir: Path) -> Path:
    """Return the built-in corpus as a .jsonl file under `cache_dir`, extracted at the first call.

    Extraction takes about 3 s. The file's name carries its sha256: a damaged one is made anew.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    python = hashlib.sha256(f"{sys.version} {stdlib}".encode()).hexdigest()[:12]
    prefix = f"builtin-{_EXTRACTION_VERSION}-{python}"
    folder = cache_dir / "corpora"
    for path in sorted(folder.glob(f"{prefix}-*.jsonl")):
        if path.stem == f"{prefix}-{_short_sha256(path.read_bytes())}":
            return path
    lines = (json.dumps({"text": text}) + "\n" for text in builtin_documents(stdlib))
    content = "".join(lines).encode()
    path = folder / f"{prefix}-{_short_sha256(content)}.jsonl"
    write_durably(path, content)
    return path


def builtin_documents(stdlib: Path) -> Iterator[str]:
    """Yield the documents in a fixed order: the topics, then one per module with docstrings.

    A text that occurs again, as many inherited docstrings do, is left out the second time.
    """
    seen: set[str] = set()
    for texts in (*_topics(), *map(_docstrings, _module_files(stdlib))):
        fresh = [text for text in dict.fromkeys(texts) if text not in seen]
        seen.update(fresh)
        if fresh:
            yield "\n\n".join(fresh) + "\n"


def _topics() -> list[list[str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship Python without its documentation
        return []
    return [[topics[name].strip()] for name in sorted(topics)]


def _module_files(stdlib: Path) -> list[Path]:
    files = (path.relative_to(stdlib) for path in stdlib.rglob("*.py"))
    return [stdlib / file for file in sorted(files) if not SKIPPED_FOLDERS & set(file.parts)]


def _docstrings(path: Path) -> list[str]:
    """Return the docstrings of one module in the order of its source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node)) and _is_text(text)]


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate written as an escape
        return False
    return bool(text.strip())


def _short_sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]

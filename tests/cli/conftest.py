"""A folder of one's own to run the commands in, with caches and ledger beside it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from door import Done, Door, at_home_in

from snugpt.cli.main import run


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """The present folder: empty, and nothing outside it is read or written."""
    with at_home_in(tmp_path):
        yield tmp_path


@pytest.fixture
def door(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Door:
    """Run a command line in this process; the leading `snugpt` may be there or not."""

    def enter(line: str) -> Done:
        words = shlex.split(line.partition(" > ")[0])
        words = words[words[:1] == ["snugpt"] :]
        monkeypatch.setattr(sys, "argv", ["snugpt", *words])
        capsys.readouterr()
        code = run(words)
        return Done(code, *capsys.readouterr())

    return enter

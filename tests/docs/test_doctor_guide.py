"""docs/guides/doctor.md: its commands run, and what it shows is what is printed today."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from snugpt.cli.main import run

TEXT = (Path(__file__).parents[2] / "docs" / "guides" / "doctor.md").read_text(encoding="utf-8")
LOG = next(block for block in re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL) if "rank5" in block)
BLOCKS = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line[2:] for block in BLOCKS for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with the guide's log."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "run.log").write_text(LOG, encoding="utf-8")
    return tmp_path


def test_every_command_of_the_guide_runs(elsewhere, capsys) -> None:
    assert len(COMMANDS) == 4
    for command in COMMANDS:
        words = shlex.split(command)
        assert words[0] == "snugpt"
        assert run(words[1:]) == 0
        assert capsys.readouterr().err == ""


def test_the_finding_in_the_guide_is_what_is_printed_today(elsewhere, capsys) -> None:
    command, _, shown = BLOCKS[0].partition("\n")
    run(shlex.split(command)[2:])
    assert capsys.readouterr().out.rstrip() == shown.rstrip()

"""What the README says is what happens: its commands run, its output is today's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from snugpt.cli.main import run
from snugpt.estimate.stacks.catalogue import SNUGPT

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
COMMANDS = [line[2:] for block in BLOCKS for line in block.splitlines() if line.startswith("$ ")]
SHOWN = re.search(r"\$ (snugpt plan --gpu rtx-4090 --depth 12)\n(.*?)\n```", README, re.DOTALL)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder with caches and ledger of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("NO_COLOR", "1")
    return tmp_path


def shell(command: str, capsys) -> str:
    words = shlex.split(command)
    assert words[0] == "snugpt"
    code = run(words[1:])
    captured = capsys.readouterr()
    assert code == 0, f"{command}: exit {code}\n{captured.err}"
    return captured.out


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 8


def test_the_plan_in_the_readme_is_what_the_program_prints_today(elsewhere, capsys) -> None:
    assert SHOWN is not None
    printed = shell(SHOWN[1], capsys)
    assert printed.rstrip().splitlines() == SHOWN[2].rstrip().splitlines()


def test_every_command_of_the_readme_runs_in_order(elsewhere, capsys) -> None:
    for command in COMMANDS:
        shell(command, capsys)


def test_the_python_of_the_readme_runs(elsewhere, capsys) -> None:
    plans, traces = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(plans, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 3
    exec(compile(traces, "README.md", "exec"), {})
    allocated, phase, largest = capsys.readouterr().out.split()
    assert int(allocated) > 2 * 8 * 512 * 5000 * 2  # logits and their gradient, in bf16
    assert phase == "backward"
    assert int(largest) > 8


def test_the_two_commands_of_a_newcomer_are_targets_of_the_makefile() -> None:
    named = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named == ["demo", "test"]
    assert set(named) <= set(targets)


def test_the_first_screen_says_what_it_is_for_and_how_to_begin() -> None:
    first_screen = "\n".join(README.splitlines()[:24])
    for needed in ("fits your GPU", "make demo", "make test", "snugpt plan"):
        assert needed in first_screen


def test_what_the_trainer_can_do_is_not_said_to_be_missing() -> None:
    said = " ".join(README.split())
    (missing,) = re.findall(r"Not here yet: (.*?)\.", said)
    assert SNUGPT.most_gpus > 1
    assert "on" in SNUGPT.levers["fp8"]
    for there, flag in (("GPUs", "`--num-gpus 2` to `8`"), ("FP8", "`--fp8` multiplies")):
        assert there not in missing
        assert flag in said
    assert "on one device" not in said


def test_full_sharding_is_excepted_from_what_is_exact_and_traced() -> None:
    said = " ".join(README.split())
    assert "`--sharding full` is the exception" in said
    assert "its receipt is a band" in said
    assert said.count("`--compile on` and `--sharding full`") == 2  # of the trace, and of all of it

"""`snugpt demo`: its sections, its receipt, and what it refuses before it begins."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from door import Door, refusal

from snugpt.cli import demo as demo_module
from snugpt.cli.demo import CARDS, PROMPTS, known_share, one_line
from snugpt.data.builtin import builtin_file
from snugpt.spec.measurement import measurement_from_json


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in text, which takes seconds to gather, gathered once."""
    folder = tmp_path_factory.mktemp("cache")
    builtin_file(folder)
    return folder


@pytest.fixture(autouse=True)
def measured_before(corpora: Path, elsewhere: Path) -> Path:
    """A machine whose speed is known and whose built-in text is there."""
    cache = Path(shutil.copytree(corpora, elsewhere / "cache" / "snugpt"))
    (cache / "machine.json").write_text(json.dumps({"cpu": {"flops_per_s": 8e10}}))
    return cache


def test_the_whole_story_in_eight_steps(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "MEASURED_TOKENS", 20)
    done = door("demo --steps 8 --name x")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    titles = [line for line in lines if re.match(r"[1-4]  |Done in ", line)]
    assert [title[:2] for title in titles] == ["1 ", "2 ", "3 ", "4 ", "Do"]
    assert "FITS" in done.out
    assert "fitted: measured on this machine" in " ".join(done.out.split())
    rows = [line.split() for line in lines if line.startswith(CARDS)]
    assert [row[0] for row in rows] == list(CARDS)
    assert "predicted; there is no record from a GPU yet" in lines
    (allocated,) = (line.split() for line in lines if line.startswith("allocated"))
    assert 0.999 <= float(allocated[5]) <= 1.001
    assert all(any(line.startswith(prompt) for line in lines) for prompt in PROMPTS)
    assert re.search(r"^\d+% of its words of four letters and more are words", done.out, re.M)
    stored = measurement_from_json(Path("runs/x/measurement.json").read_bytes())
    assert 0.999 <= stored.ratios["allocated"] <= 1.001
    assert stored.steps == 8
    assert max(map(len, done.out.partition("4  What it writes")[0].splitlines())) <= 80
    assert door("generate x --prompt 'The file' --max-new-tokens 3").code == 0
    assert "1 measurement," in door("records").out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--steps 0", "0"),
        ("--steps few", "few"),
        ("--name ../x", "name = '../x'"),
        ("--name ''", "name = ''"),
        ("--nmae x", "did you mean '--name'"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_shown(
    door: Door, measured_before: Path, flags: str, named: str
) -> None:
    (measured_before / "machine.json").unlink()
    done = door(f"demo {flags}")
    error, _ = refusal(done, 2)
    assert named in error
    assert done.out == ""
    assert "measuring" not in done.err
    assert not os.path.exists("runs")


def test_an_unmeasured_machine_is_measured_once(
    door: Door, measured_before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("snugpt.run.machine_speed.measure_cpu_rate", lambda seconds: 7e10)
    monkeypatch.setattr(demo_module, "run_training", lambda plan, name: None)
    monkeypatch.setattr(demo_module, "_show_texts", lambda name, plan: None)
    (measured_before / "machine.json").unlink()
    first, again = door("demo"), door("demo")
    assert "measuring how fast this machine trains" in first.err
    assert json.loads((measured_before / "machine.json").read_text())["cpu"]["flops_per_s"] == 7e10
    assert again.err == ""


def test_the_next_demo_has_the_next_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for _ in range(3):
        names.append(demo_module._free_name(Path("runs")))
        Path("runs", names[-1]).mkdir(parents=True)
    assert names == ["demo", "demo-2", "demo-3"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" is\n  here", " is here"), ("s are", "s are"), ("\n\nNew. ", " New."), ("", "")],
)
def test_a_text_on_one_line_keeps_the_space_after_its_prompt(text: str, shown: str) -> None:
    assert one_line("The file", text) == shown


def test_known_words_are_counted_from_four_letters_on() -> None:
    texts = ["The File is here, a fish", "file fil filx"]
    assert known_share(texts, {"file", "here"}) == 3 / 5
    assert known_share(["a be sea"], {"file"}) == 0.0

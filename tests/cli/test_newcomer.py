"""What a newcomer broke in an afternoon, each once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from snugpt.cli.main import run
from snugpt.planner.answer import plan as make_plan
from snugpt.spec.plan import encode_plan, read_plan

D2 = ["plan", "--gpu", "rtx-3060", "--depth", "2"]
TINY = ["--gpu", "cpu", "--layers", "1", "--width", "32", "--heads", "1", "--seq-len", "32"]


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("output", ["", "-", "missing/plan.json", "link", "fifo"])
def test_a_plan_is_never_written_over_what_is_no_file(tmp_path, monkeypatch, capsys, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").write_text("kept")
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "fifo")
    assert run([*D2, "-o", output]) == 2
    assert [line.split(":")[0] for line in errors(capsys)] == ["error", "hint"]
    assert (tmp_path / "target").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "link", "target"]


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--batch-size", "8", "--device-batch-size", "3"], "batch_size = 8"),
        (["--batch-size", "8", "--grad-accum-steps", "16"], "batch_size = 8"),
        (
            ["--batch-size", "8", "--device-batch-size", "4", "--grad-accum-steps", "4"],
            "batch_size = 8",
        ),
        (["--reserve", "100"], "reserve ="),
    ],
)
def test_what_was_said_is_never_dropped_without_a_word(capsys, flags, field):
    assert run([*D2, *flags]) == 2
    first, hint = errors(capsys)
    assert field in first
    assert run(hint.removeprefix("hint: snugpt ").split()) in (0, 3)


def test_without_a_verb_the_help_is_shown(capsys):
    assert run([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_a_full_output_is_one_line_and_no_traceback():
    command = [sys.executable, "-m", "snugpt.cli", "gpus"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: output can't be written")
    assert "Traceback" not in done.stderr


def test_a_text_shorter_than_a_row_is_refused_by_the_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "short.txt").write_text("short")
    assert run([*D2, "--input", str(tmp_path / "short.txt")]) == 2
    assert "5 bytes" in errors(capsys)[0]


def test_an_edited_plan_is_predicted_anew_before_it_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("CACHE", "DATA"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    asked = {"gpu": "cpu", "layers": 1, "width": 32, "heads": 1, "seq_len": 32, "vocab_size": 512}
    made = make_plan(**asked, num_iterations=4, batch_size=4)
    wrong = msgspec.structs.replace(made.memory, allocated_bytes=1)
    Path("plan.json").write_bytes(encode_plan(msgspec.structs.replace(made, memory=wrong)))
    assert run(["train", "plan.json", "--name", "edited"]) == 0
    captured = capsys.readouterr()
    assert "predicted anew" in captured.err
    ratio = float(captured.out.splitlines()[1].split()[5])
    assert 0.999 < ratio < 1.001
    assert read_plan(Path("runs/edited/plan.json")).memory.allocated_bytes > 1

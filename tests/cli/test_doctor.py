"""`snugpt doctor`: three lines, mends that can be copied, one JSON object, and its exit codes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from door import Door, names_under, refusal

FULL = (
    "argv  snugpt train --gpu rtx-3060 --depth 12 --device-batch-size 8\n"
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"
    " capacity of 11.63 GiB of which 0.50 GiB is free. Including non-PyTorch memory, this process"
    " has 11.13 GiB memory in use. Of the allocated memory 10.80 GiB is allocated by PyTorch, and"
    " 200.00 MiB is reserved by PyTorch but unallocated.\n"
)


@pytest.fixture
def log(elsewhere: Path) -> Path:
    path = elsewhere / "run.log"
    path.write_text(FULL)
    return path


def test_three_lines_then_the_mends_on_80_columns(log: Path, door: Door) -> None:
    done = door("doctor run.log")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines if line[:1].isalpha()][:4] == [
        "log", "what", "held", "why",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 80
    assert "what     CUDA ran out of memory on GPU 0: 2.00 GiB were asked for" in done.out
    assert "mend 1" in done.out


def test_the_commands_of_the_mends_are_answered(log: Path, door: Door) -> None:
    mends = json.loads(door("doctor run.log --json").out)["mends"]
    assert mends
    for mend in mends:
        command = mend["command"].replace("snugpt train", "snugpt plan", 1)
        assert door(command).code == (0 if mend["fits"] else 3)


def test_what_is_shown_is_what_json_says(log: Path, door: Door) -> None:
    shown, told = door("doctor run.log").out, json.loads(door("doctor run.log --json").out)
    assert told["recognised"] is True
    assert told["cause"] == "full"
    joined = " ".join(shown.replace("\\\n", " ").split())
    for key in ("happened", "held", "why"):
        assert told[key] in joined
    for mend in told["mends"]:
        assert " ".join(mend["command"].split()) in joined


def test_a_log_without_a_failure_is_said_and_exits_with_1(elsewhere: Path, door: Door) -> None:
    (elsewhere / "fine.log").write_text("step 1 loss 3.2\nall is well\n")
    done = door("doctor fine.log")
    assert done.code == 1
    assert "no failure is recognised" in done.out
    assert json.loads(door("doctor fine.log --json").out)["recognised"] is False


@pytest.mark.parametrize("line", ["doctor none.log", "doctor .", "doctor empty", "doctor noise"])
def test_what_is_no_log_is_a_bad_question(line: str, elsewhere: Path, door: Door) -> None:
    (elsewhere / "empty").write_bytes(b"")
    (elsewhere / "noise").write_bytes(bytes(range(256)) * 40)
    before = names_under(elsewhere)
    refusal(door(line), 2)
    assert names_under(elsewhere) == before


def test_a_card_that_is_not_known_is_a_bad_question(log: Path, door: Door) -> None:
    message, _ = refusal(door("doctor run.log --gpu rtx-9999"), 2)
    assert "rtx-9999" in message
    refusal(door("doctor --gpu rtx-4090"), 2)


def test_a_pipe_is_a_log(log: Path, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(FULL.encode())))
    assert "CUDA ran out of memory" in door("doctor -").out


def test_nothing_of_a_log_reaches_the_terminal_raw(elsewhere: Path, door: Door) -> None:
    (elsewhere / "evil.log").write_bytes(
        b"\x1b]0;owned\x07\x1b[2Jpython \x1b[31mt.py --batch_size=4 --x='\x1b[1m`id`'\n"
        b"\x1b[41mCUDA out of memory. Tried to allocate 1.00 GiB.\x9b31m\n"
    )
    done = door("doctor evil.log")
    assert done.code == 0
    assert "\x1b" not in done.out
    assert "owned" not in done.out


def test_without_a_log_the_machine_is_checked(elsewhere: Path, door: Door) -> None:
    done = door("doctor")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    labels = {line.split()[0] for line in lines if line[:1].strip()}
    assert {"system", "torch", "RAM", "disk", "next"} <= labels
    told = json.loads(door("doctor --json").out)
    assert {"system", "torch", "RAM", "disk"} <= {check["name"] for check in told["checks"]}
    assert names_under(elsewhere) == {"text.txt"}

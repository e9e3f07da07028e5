"""A hint is followed: it keeps what was said, changes what is wrong, and is not refused in turn."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from door import Door, refusal

from snugpt.cli import train

# Each with what its hint has to keep.
BAD = {
    "plan --kv-heads 5 --width 96 --depth 3 --style nanochat --gpu v100-16gb":
        "--gpu v100-16gb --style nanochat --depth 3 --width 96 --kv-heads 3",
    "plan --gpu rtx-3060 --style llama --width 96 --layers 2 --heads 5 --kv-heads 5 --seq-len 512":
        "--gpu rtx-3060 --style llama --layers 2 --width 96 --seq-len 512",
    "plan --gpu rtx-3060 --width 768 --depth 3 --heads 7 --seq-len 512":
        "--gpu rtx-3060 --depth 3 --width 768 --heads 8 --seq-len 512",
    "plan --gpu rtx-3060 --style llama --depth 2 --seq-len 512 --window-pattern XL":
        "--gpu rtx-3060 --style llama --depth 2 --seq-len 512",
    "plan --stack nanochat@2025-10 --gpu rtx-4090 --depth 9":
        "--stack nanochat@2025-10 --gpu rtx-4090 --depth 10",
    "plan --stack nanochat@2025-10 --gpu rtx-4090 --depth 9 --seq-len 512 --fp8":
        "--stack nanochat@2025-10 --gpu rtx-4090 --depth 10 --seq-len 512",
    "plan --stack nanochat@2025-10 --gpu rtx-4090 --depth 9 --compile off":
        "--stack nanochat@2025-10 --gpu rtx-4090 --depth 10",
    "plan --stack nanochat@2025-10 --gpu rtx-4090 --depth 9 --compile off --fp8":
        "--stack nanochat@2025-10 --gpu rtx-4090 --depth 10",
    "plan --stack nanochat@2026-07 --gpu rtx-4090 --depth 8 --seq-len 512 --compile off --fp8":
        "--stack nanochat@2026-07 --gpu rtx-4090 --depth 8 --seq-len 512 --compile off",
    "plan --stack nanochat@2026-3 --gpu rtx-4090 --depth 4 --clip-norm 1":
        "--stack nanochat@2026-03 --gpu rtx-4090 --depth 4",
    "plan --gpu rtx-3090 --depth 9 --fp8": "--gpu rtx-3090 --depth 9",
    "plan --gpu rtx-4090 --preset 150N --seq-len 512": "--gpu rtx-4090 --preset 150M --seq-len 512",
    "plan --gpu rtx-4090 --depth 4 --fp8 --reserve 100": "--gpu rtx-4090 --depth 4",
    "plan --gpu t4 --depth 4 --compute-dtype bf16 --warmup-fraction 0.8 --seed 7":
        "--gpu t4 --depth 4 --compute-dtype fp16 --seed 7",
    "plan --gpu h200 --width 65536 --layers 1024 --device-batch-size 9999999": "--gpu h200",
    "plan --gpu t4 --task generate --depth 4 --seq-len 1": "--task generate --gpu t4 --depth 4",
    "train --depth 2 --compile on --gpu cpu --name mine --num-iterations 3 --input text.txt":
        "--gpu cpu --depth 2 --input text.txt --num-iterations 3 --compile off --name mine",
    "train --depth 2 --gpu cpu --fp8 --seed 7 --input text.txt":
        "--gpu cpu --depth 2 --input text.txt --seed 7",
    "plan --compile": "--help",
    "train --depth": "--help",
    "trace --gpu": "--help",
    "records accuracy --records": "--help",
    "--verbose": "--help",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_the_command_of_a_hint_is_accepted_and_keeps_what_was_said(
    line: str, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "run_training", lambda *_, **__: 0)
    done = door(line)
    _, hint = refusal(done, 2)
    assert done.out == ""
    words = shlex.split(hint)
    verb = line.split()[0]
    assert words[: 1 if verb == "--verbose" else 2] == ["snugpt", verb][: len(words) - 1]
    assert hint.endswith(BAD[line]) or BAD[line] in hint
    assert door(hint).code in (0, 3)
    assert not Path("runs").exists()


def test_measuring_this_processor_for_a_card_is_refused_and_not_ignored(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Path] = []
    monkeypatch.setattr("snugpt.run.machine_speed.measure_cpu_rate", lambda: 1e11)
    monkeypatch.setattr(
        "snugpt.run.machine_speed.keep_cpu_rate", lambda folder, _: measured.append(folder)
    )
    done = door("plan --gpu rtx-4090 --depth 2 --measure")
    error, hint = refusal(done, 2)
    assert (done.out, measured) == ("", [])
    assert error.startswith("--measure is not allowed")
    assert "NVIDIA GeForce RTX 4090" in error
    assert hint == "snugpt plan --gpu rtx-4090 --depth 2"
    assert door("plan --gpu cpu --depth 2 --measure").code in (0, 3)
    assert len(measured) == 1

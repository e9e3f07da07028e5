"""`snugpt plan --stack nanochat@...` and what the other verbs say to such a plan."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from door import SMALL, Door, refusal

from snugpt.estimate.stacks.catalogue import STACKS

NAMES = [name for name in STACKS if name != "snugpt"]
PLAN = "plan --stack {} --gpu h100 --num-gpus 8 --depth 20 --device-batch-size 16"


@pytest.mark.parametrize("name", NAMES)
def test_the_screen_shows_the_stacks_own_command(name: str, door: Door) -> None:
    done = door(PLAN.format(name))
    assert done.code == 0
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 79
    start = next(i for i, line in enumerate(lines) if line.startswith(f"run      with {name}:"))
    command = " ".join(line.strip().removesuffix(" \\") for line in lines[start + 1 : start + 3])
    made = json.loads(door(f"{PLAN.format(name)} --json").out)
    assert command == made["command"]
    assert made["stack"] == made["question"]["stack"] == name
    assert made["command"].startswith("torchrun --standalone --nproc_per_node=8 ")
    assert "could be had back" in done.out


def test_the_mend_can_be_copied_from_the_screen(door: Door) -> None:
    for name in NAMES:
        lines = door(PLAN.format(name)).out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.strip().startswith("sed -i"))
        text = lines[start]
        while text.endswith("\\"):
            start += 1
            text = text.removesuffix("\\") + lines[start]
        words = shlex.split(text)
        assert words[:2] == ["sed", "-i"]
        assert words[-1] in ("nanochat/optim.py", "nanochat/muon.py")


def test_what_does_not_fit_exits_3_and_hints_the_same_stack(door: Door) -> None:
    error, hint = refusal(door("plan --stack nanochat --gpu rtx-3060 --depth 24"), 3)
    assert error.startswith("does not fit on NVIDIA GeForce RTX 3060")
    assert "--stack nanochat@2026-07" in hint
    assert door(hint).code == 0


def test_a_plan_of_nanochat_is_not_trained_here(door: Door) -> None:
    assert door("plan --stack nanochat --gpu h100 --depth 4 -o plan.json").code == 0
    done = door("train plan.json")
    error, hint = refusal(done, 2)
    assert (done.out, len(done.err.splitlines())) == ("", 2)  # no run is announced
    assert "stack = 'nanochat@2026-07'" in error
    assert hint == json.loads(Path("plan.json").read_text())["command"]
    assert not Path("runs").exists()
    error, hint = refusal(door("train --stack nanochat --gpu h100 --depth 4"), 2)
    assert hint.startswith("python -m scripts.base_train ")
    assert not Path("runs").exists()


@pytest.mark.parametrize("flag", ["--num-gpus", "--nproc-per-node", "--world-size", "--num_gpus"])
def test_spellings_of_the_number_of_cards(flag: str, door: Door) -> None:
    made = json.loads(door(f"plan --stack nanochat --gpu h100 --depth 4 {flag} 4 --json").out)
    assert made["recipe"]["world_size"] == 4
    assert made["recipe"]["launcher"] == "torchrun"
    assert "--nproc_per_node=4 " in made["command"]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("fp8", "on", "fp8 = 'on'"),
        ("sharding", "optimizer", "sharding = 'optimizer'"),
        ("stack", "nanochat@2026-07", "stack = 'nanochat@2026-07' runs its own program"),
        ("schedule", None, "schedule"),
    ],
)
def test_a_plan_edited_into_another_programs_is_not_trained_here(
    field: str, value: object, named: str, door: Door
) -> None:
    assert door(f"plan {SMALL} -o plan.json").code == 0
    made = json.loads(Path("plan.json").read_text())
    made["recipe"][field] = value
    Path("plan.json").write_text(json.dumps(made))
    error, hint = refusal(door("train plan.json"), 2)
    assert named in error
    assert not Path("runs").exists()
    assert door(hint.replace("snugpt train", "snugpt plan")).code == 0

"""`snugpt plan`: one JSON object with stable keys, one screen of 80 columns, flags by field."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from snugpt.cli.main import run
from snugpt.cli.options import SECTIONS, question_from
from snugpt.spec.plan import read_plan
from snugpt.spec.question import Question

D12 = ["plan", "--gpu", "rtx-4090", "--depth", "12"]
# The contract of `--json`: others may be added, none may go.
KEYS = {
    "": "schema fits question stack command shape parameters recipe memory speed data host cost"
    " alternatives rejected ladder",
    "shape": "style num_layers model_dim num_heads num_kv_heads head_dim mlp_dim vocab_size"
    " padded_vocab_size context_len",
    "parameters": "total groups",
    "recipe": "task seq_len device_batch_size grad_accum_steps world_size total_batch_tokens"
    " total_tokens compute_dtype loss checkpoint optimizer state_dtype weight_dtype fp8 compile"
    " sharding offload",
    "memory": "requested_bytes allocated_bytes reserved_bytes process_bytes capacity_bytes"
    " headroom_bytes peak_phase terms",
    "speed": "tokens_per_s step_s total_tokens hours basis",
    "data": "tokens characters shards epochs",
    "host": "ram_bytes disk_bytes checkpoint_bytes",
}
ITEM_KEYS = {
    "alternatives": "change recipe memory speed command",
    "rejected": "change because",
    "ladder": "levers bytes_saved time_factor exact",
}


def _json(capsys: pytest.CaptureFixture[str], *flags: str, code: int = 0) -> dict[str, Any]:
    assert run([*flags, "--json"]) == code
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def test_one_of_a_thing_is_not_written_as_many(capsys: pytest.CaptureFixture[str]) -> None:
    one = "--depth 1 --device-batch-size 1 --total-batch-tokens 2048 --total-tokens 2048"
    assert run(["plan", "--gpu", "rtx-4090", *one.split()]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "train nanochat 1 layer, 12.8M parameters" in text
    assert "1 layer x 128 wide, 1 head, context" in text
    assert ": 1 step, 2.05K tokens" in text
    assert "= 1 x 2048 x 1 pass; pinned" in text
    two = "--depth 4 --device-batch-size 1 --total-batch-tokens 4096 --total-tokens 8192"
    assert run(["plan", "--gpu", "rtx-4090", *two.split()]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "4 layers x 256 wide, 2 heads, context" in text
    assert ": 2 steps, 8.19K tokens" in text
    assert "x 2 passes; pinned" in text


def test_json_holds_the_stable_keys(capsys: pytest.CaptureFixture[str]) -> None:
    made = _json(capsys, *D12)
    for path, names in KEYS.items():
        assert set(names.split()) <= set(made[path] if path else made)
    for path, names in ITEM_KEYS.items():
        assert all(set(item) == set(names.split()) for item in made[path])
    for band in ("reserved_bytes", "process_bytes"):
        assert set(made["memory"][band]) == {"low", "expected", "high"}
    assert {"name", "category", "bytes", "formula", "basis"} == set(made["memory"]["terms"][0])
    assert made["cost"] is None
    assert (made["recipe"]["task"], made["stack"]) == ("train", "snugpt")


def test_the_error_line_names_the_largest_part_of_the_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "--gpu rtx-4090 --depth 24 --device-batch-size 4 --loss plain --checkpoint none"
    assert run(["plan", *words.split(), "--offload", "none", "--exact"]) == 3
    printed = capsys.readouterr()
    (first,) = re.findall(r"█ (\w+) ([\d.]+)", printed.out)
    assert first == ("optimizer", "7.78")
    assert f"largest: {first[0]} {first[1]} GiB\n" in printed.err


def test_generation_has_its_own_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = _json(capsys, *D12, "--task", "generate")["recipe"]
    expected = {"task", "batch", "prompt_tokens", "max_new_tokens", "kv_dtype", "weight_dtype"}
    assert set(recipe) == expected


def test_what_does_not_fit_exits_3_with_one_object_and_a_way_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["plan", "--gpu", "rtx-3060", "--depth", "40", "--json"]) == 3
    printed = capsys.readouterr()
    made = json.loads(printed.out)
    assert made["fits"] is False
    nearest = made["alternatives"][0]
    assert nearest["memory"]["headroom_bytes"] >= 0
    error, hint = printed.err.splitlines()
    assert error.startswith("error: does not fit on NVIDIA GeForce RTX 3060")
    assert hint == f"hint: {nearest['command']}"
    assert run(shlex.split(nearest["command"])[1:]) == 0


def test_the_command_of_a_plan_gives_the_plan_again(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "tiny", "--gpu", "RTX 3060", "--seq_len", "64", "--reserve", "1.5GiB"]
    first = _json(capsys, "plan", *flags, "--no-tie", "--dropout", "0.1")
    command = shlex.split(first["command"])
    assert command[:2] == ["snugpt", "plan"]
    assert _json(capsys, *command[1:]) == first


def test_a_plan_is_written_only_when_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert run(["plan", "--gpu", "rtx-3060", "--depth", "40", "-o", str(file)]) == 3
    assert not file.exists()
    assert run([*D12, "-o", str(file)]) == 0
    assert read_plan(file).fits
    capsys.readouterr()
    assert run([*D12, "-o", str(tmp_path / "none" / "plan.json")]) == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "flags",
    [
        D12[1:],
        ["--gpu", "rtx-3060", "--depth", "24"],
        ["--gpu", "gtx-1070", "--task", "generate", "--preset", "150M_1024"],
        ["--gpu", "t4", "--preset", "tiny_char", "--hours", "0.5"],
        ["--gpu", "b200", "--depth", "48", "--style", "llama", "--checkpoint", "blocks"],
    ],
)
def test_the_screen_has_80_columns_and_one_page(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(["plan", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 32
    assert any(word in lines[0] for word in ("FITS", "DOES NOT FIT"))


def test_the_bar_is_as_long_as_the_process_is_large(capsys: pytest.CaptureFixture[str]) -> None:
    made = _json(capsys, *D12)
    run(D12)
    bar = next(line for line in capsys.readouterr().out.splitlines() if "│" in line)
    memory = made["memory"]
    used = len(bar.strip().rstrip("│").rstrip())
    share = memory["process_bytes"]["high"] / memory["capacity_bytes"]
    assert used / bar.strip().index("│") == pytest.approx(share, abs=0.03)


def test_every_field_of_a_question_has_a_flag() -> None:
    listed = [name for fields in SECTIONS.values() for name in fields]
    assert len(listed) == len(set(listed))
    assert {*listed, "stack"} == set(Question.__struct_fields__)


@pytest.mark.parametrize(
    ("alias", "field"),
    [
        ("--max-seq-len", "seq_len"),
        ("--block_size", "seq_len"),
        ("--total-batch-size", "total_batch_tokens"),
        ("--max_iters", "num_iterations"),
        ("--num-iterations", "num_iterations"),
        ("--target-param-data-ratio", "tokens_per_param"),
        ("--save-every", "save_every"),
        ("--learning_rate=", "learning_rate"),
    ],
)
def test_other_programs_names_are_understood(
    alias: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [alias + "1"] if alias.endswith("=") else [alias, "4096"]
    assert _json(capsys, *D12, *said)["question"][field] == (1 if alias.endswith("=") else 4096)


def test_question_from_leaves_out_what_was_not_said() -> None:
    flags = dict.fromkeys(Question.__struct_fields__) | {"depth": 4, "config": None}
    assert question_from(flags) == Question(depth=4)


def test_a_text_is_measured_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.txt"
    text.write_text("ein Bär, zwei Bären\n" * 5000, encoding="utf-8")
    made = _json(capsys, *D12, "--seq-len", "64", "--input", str(text))
    assert made["data"]["characters"] == 20 * 5000
    assert made["shape"]["vocab_size"] == 2048
    assert made["data"]["epochs"] > 100
    assert any("read about" in note for note in made["notes"])


def test_the_api_is_the_same_plan(capsys: pytest.CaptureFixture[str]) -> None:
    from snugpt.planner.answer import plan

    made = plan(gpu="rtx-4090", depth=12)
    assert json.loads(msgspec.json.encode(made)) == _json(capsys, *D12)


def _shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    snugpt = f"{sys.executable} -c 'from snugpt.cli.main import main; main()'"
    return subprocess.run(
        ["bash", "-c", line.replace("snugpt", snugpt)],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip


def test_a_closed_pipe_is_quiet() -> None:
    done = _shell("set -o pipefail; snugpt plan --gpu t4 --depth 4 --json | head -c 1")
    assert (done.stdout, done.stderr) == ("{", "")


def test_colour_is_for_terminals_and_a_poor_terminal_gets_question_marks() -> None:
    done = _shell("snugpt plan --gpu t4 --depth 4", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "?" in done.stdout


TORCH_FREE = """
import io, sys, contextlib, pkgutil
from importlib import import_module
import snugpt.spec, snugpt.estimate, snugpt.planner, snugpt.ledger
for package in (snugpt.spec, snugpt.estimate, snugpt.planner, snugpt.ledger):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        import_module(module.name)
from snugpt.cli.main import run
with contextlib.redirect_stdout(io.StringIO()):
    for argv in (["--help"], ["plan", "--help"], ["plan", "--gpu", "t4", "--depth", "4"],
                 ["gpus"], ["gpus", "t4", "--json"], ["plan", "--depth", "2", "--json"]):
        assert run(argv) in (0, 3), argv
print([name for name in ("torch", "numpy", "rich") if name in sys.modules])
"""


def test_planning_leaves_torch_numpy_and_rich_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TORCH_FREE], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr

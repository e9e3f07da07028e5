"""`snugpt train`: plan, progress and receipt; what can't be trained is refused in two lines."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from door import SMALL, Done, Door, names_under, refusal

import snugpt.run.train
from snugpt.cli.main import run
from snugpt.cli.training_screen import TrainingScreen, receipt_lines
from snugpt.ledger.store import read_all
from snugpt.run.reports import EvaluationReport, Notice, StepReport
from snugpt.spec.measurement import measurement_from_json
from snugpt.spec.plan import read_plan
from snugpt.units import GIB

TRAIN = f"train {SMALL} --num-iterations 3 --name small"
WHOLE_RUN = {
    ".lock", "argv", "plan.json", "tokenizer.json", "metrics.jsonl", "measurement.json",
    *(
        f"checkpoints/step-0000000{step}/{name}"
        for step in (2, 3)
        for name in ("model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")
    ),
}  # fmt: skip


def plan_file(door: Door, flags: str = f"{SMALL} --num-iterations 3") -> Path:
    assert door(f"plan {flags} -o plan.json").code == 0
    return Path("plan.json")


def test_flags_are_planned_then_trained_and_the_receipt_ends_it(door: Door) -> None:
    done = door(TRAIN)
    assert done.code == 0
    assert "FITS" in done.out.splitlines()[0]
    *_, head, allocated, reserved, process, speed = done.out.splitlines()
    assert head.split() == ["peak", "memory", "predicted", "measured", "ratio", "counted", "by"]
    assert [line.split()[0] for line in (allocated, reserved, process)] == [
        "allocated", "reserved", "process",
    ]  # fmt: skip
    assert re.fullmatch(r"[\d,]+ tokens/s, \d\.\d{4} bits per byte", speed)
    assert names_under(Path("runs/small")) == WHOLE_RUN
    assert max(map(len, done.out.splitlines())) <= 80


def test_progress_goes_to_stderr_and_ends_in_a_command_that_works(door: Door) -> None:
    lines = door(TRAIN).err.splitlines()
    assert lines[:2] == [f"run   {Path('runs/small')}", f"argv  snugpt {TRAIN}"]
    assert lines[2:5] == ["reading", "training the tokenizer", "encoding"]
    assert any(re.match(r"step +3/3  loss \d\.\d{3}", line) for line in lines)
    assert any(re.fullmatch(r"step +3  validation \d\.\d{4} bits/byte", line) for line in lines)
    assert "\x1b" not in "".join(lines)
    label, command = lines[-1].split(": ")
    assert label == "generate with"
    assert door(command).code == 0


def test_a_plan_file_is_trained_as_it_stands(door: Door) -> None:
    file = plan_file(door)
    done = door(f"train {file} --name mine")
    assert done.code == 0
    assert done.out.startswith("peak memory")
    assert read_plan(Path("runs/mine/plan.json")) == read_plan(file)
    assert Path("runs/mine/argv").read_text() == "snugpt train plan.json --name mine\n"


def test_the_same_question_has_the_same_run_with_and_without_a_plan_file(door: Door) -> None:
    door(f"train {plan_file(door)}")
    (folder,) = Path("runs").iterdir()
    again = door(f"train {SMALL} --num-iterations 3")
    assert "finished before, after step 3" in again.err
    assert list(Path("runs").iterdir()) == [folder]


def test_json_is_exactly_the_measurement_that_is_kept(door: Door) -> None:
    done = door(f"{TRAIN} --json")
    assert done.code == 0
    assert done.out.count("\n") == 1
    printed = measurement_from_json(done.out)
    assert printed == measurement_from_json(Path("runs/small/measurement.json").read_bytes())
    assert read_all(Path("data/snugpt")) == [printed]
    assert (printed.steps, printed.outcome) == (3, "fit")
    assert printed.predicted == read_plan(Path("runs/small/plan.json")).memory


def test_a_finished_run_says_so_and_shows_its_receipt_again(door: Door) -> None:
    first = json.loads(door(f"{TRAIN} --json").out)
    before = {name: Path("runs/small", name).read_bytes() for name in WHOLE_RUN - {"argv"}}
    again = door(f"{TRAIN} --json")
    assert again.code == 0
    assert "finished before, after step 3" in again.err
    assert {name: Path("runs/small", name).read_bytes() for name in before} == before
    assert len(read_all(Path("data/snugpt"))) == 1
    assert json.loads(again.out) == first


def test_a_run_of_one_step_does_not_claim_that_it_was_trained_before(door: Door) -> None:
    done = door(TRAIN.replace("--num-iterations 3", "--num-iterations 1"))
    assert done.code == 0
    assert "already" not in done.err


def test_the_receipt_prints_predicted_over_measured(door: Door) -> None:
    measurement = measurement_from_json(door(f"{TRAIN} --json").out)
    lines = {line.split()[0]: line for line in receipt_lines(measurement)[1:4]}
    for counter, ratio in measurement.ratios.items():
        assert f"{ratio:.4f}" in lines[counter].split()
        assert lines[counter].endswith(measurement.counters[counter])
    assert 0.999 <= measurement.ratios["allocated"] <= 1.001


def test_the_receipt_tells_of_steps_that_ran_out_of_memory(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step, tries = snugpt.run.train.take_step, []

    def full_twice(*arguments):
        tries.append(None)
        if len(tries) in (2, 3):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return take_step(*arguments)

    line = TRAIN + " --device-batch-size 4 --save-every 1"
    with monkeypatch.context() as full:
        full.setattr("snugpt.run.train.take_step", full_twice)
        done = door(line)
    assert done.code == 0
    told = "2 retries after out of memory: device_batch_size 4 -> 1"
    assert done.out.splitlines()[-1] == told
    assert door(line).out.splitlines()[-1] == told  # of the run that has ended, too
    assert "after out of memory" not in door(f"{line} --name other").out


def test_a_plan_and_flags_together_are_refused(door: Door) -> None:
    error, hint = refusal(door(f"train {plan_file(door)} --learning-rate 0.1"), 2)
    assert "learning_rate" in error
    assert door(hint).code == 0
    assert not Path("runs").exists()


# A field of plan.json, what is put there, and what the error names.
EDITS: list[tuple[str, Any, str]] = [
    ("schema", 2, "schema"),
    ("schema", None, "schema"),
    ("recipe.device_batch_size", -1, "device_batch_size = -1"),
    ("recipe.device_batch_size", 3, "total_batch_tokens = 128 is not 3 x 32"),
    ("recipe.total_batch_tokens", 100, "total_batch_tokens = 100"),
    ("recipe.total_tokens", 0, "total_tokens = 0"),
    ("recipe.seq_len", 1 << 41, "seq_len"),
    ("recipe.schedule.learning_rate", float("nan"), "malformed"),
    ("recipe.schedule.learning_rate", -1.0, "learning_rate = -1.0"),
    ("recipe.schedule.warmup_fraction", 2.0, "warmup_fraction = 2.0"),
    ("recipe.schedule.eval_every_steps", 0, "eval_every_steps = 0"),
    ("recipe.optimizer", "sgd", "recipe.optimizer = 'sgd' is not allowed: muon, adamw"),
    ("recipe.state_dtype", "int4", "recipe.state_dtype = 'int4' is not allowed: fp32, bf16, int8"),
    ("recipe.selective_steps", ["all"], "'all' is not allowed: pointwise, qkv, up"),
    ("recipe.schedule.clip_norm", 1001.0, "clip_norm = 1001.0 is not allowed: 0 to 1000"),
    ("recipe.optimiser", "muon", "optimiser"),
    ("recipe.world_size", 2, "x 2 = 256"),
    ("shape.model_dim", 33, "model_dim = 33"),
    ("shape.num_layers", 0, "num_layers = 0"),
    ("shape.context_len", 16, "context"),
    ("shape.dropout", 1.5, "dropout = 1.5"),
    ("gpu.backend", "tpu", "gpu.backend = 'tpu' is not allowed: cuda, "),
    ("memory", {}, "$.memory"),
    ("recipe", None, "recipe"),
]


@pytest.mark.parametrize(("field", "value", "named"), EDITS)
def test_a_plan_with_a_field_that_can_not_be_is_refused(
    door: Door, field: str, value: Any, named: str
) -> None:
    file = plan_file(door)
    plan = json.loads(file.read_bytes())
    *parents, last = field.split(".")
    inner = plan
    for name in parents:
        inner = inner[name]
    inner[last] = value
    file.write_text(json.dumps(plan))
    written = file.read_bytes()
    error, hint = refusal(door(f"train {file}"), 2)
    assert named in error
    assert error.count("plan.json") == 1
    command = plan["command"] if value == value else "snugpt plan --depth 12"  # NaN is no JSON
    assert hint == f"{command} -o plan-2.json"
    assert door(hint).code == 0
    assert file.read_bytes() == written  # what the user wrote is not overwritten
    assert Path("plan-2.json").exists()
    assert not Path("runs").exists()


def test_what_an_edited_plan_says_of_its_command_is_hinted_only_if_it_is_one(door: Door) -> None:
    file = plan_file(door)
    plan = json.loads(file.read_bytes()) | {"schema": 2}
    for command in (
        "rm -r runs",
        "snugpt plan --depth 2; ls",
        "snugpt plan\nls",
        "snugpt trace",
        3,
    ):
        file.write_text(json.dumps(plan | {"command": command}))
        _, hint = refusal(door(f"train {file}"), 2)
        assert hint == "snugpt plan --depth 12 -o plan-2.json"


def test_an_edited_plan_for_several_gpus_is_hinted_as_its_own_question(door: Door) -> None:
    asked = "plan --gpu rtx-4090 --num-gpus 2 --depth 2 --seq-len 64"
    assert door(f"{asked} -o plan.json").code == 0
    file = Path("plan.json")
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"schema": 2}))
    _, hint = refusal(door("train plan.json"), 2)
    assert hint == f"snugpt {asked} -o plan-2.json"
    assert door(hint).code == 0


def test_a_plan_that_is_not_there_is_hinted_under_its_name(door: Door) -> None:
    _, hint = refusal(door("train none.json"), 1)
    assert hint == "snugpt plan --depth 12 -o none.json"


@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_a_plan_cut_short_is_refused(door: Door, part: float) -> None:
    file = plan_file(door)
    content = file.read_bytes().rstrip()
    file.write_bytes(content[: int(part * len(content))])
    error, _ = refusal(door(f"train {file}"), 2)
    assert "plan.json is not a plan" in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("line", "code", "named"),
    [
        ("train none.json", 1, "none.json"),
        ("train .", 1, "directory"),
        ("train text.txt", 2, "text.txt is not a plan"),
        ("train plan.json plan.json", 2, "unexpected extra argument"),
        ("train plan.json --name ../x", 2, "name = '../x'"),
        ("train plan.json --name ''", 2, "name = ''"),
        ("train plan.json --nmae x", 2, "did you mean '--name'"),
        (f"{TRAIN} --input none.txt", 2, "input = 'none.txt'"),
        (f"{TRAIN} --input empty.txt", 2, "input = 'empty.txt' is not allowed: no text in it"),
        (f"{TRAIN} --total-batch-tokens 100", 2, "total_batch_tokens = 100"),
        (f"{TRAIN} --task generate", 2, "--task"),
        (f"{TRAIN} --max-new-tokens 5", 2, "--max-new-tokens"),
    ],
)
def test_a_line_that_can_not_be_trained_is_refused_and_leaves_nothing(
    door: Door, line: str, code: int, named: str
) -> None:
    plan_file(door)
    Path("empty.txt").write_text("")
    error, _ = refusal(door(line), code)
    assert named in error
    assert not Path("runs").exists()


@pytest.mark.parametrize("text", ["Too short.", None])
def test_a_text_that_is_too_short_or_gone_leaves_no_run_behind(
    door: Door, text: str | None
) -> None:
    file = plan_file(door)
    Path("text.txt").unlink()
    if text is not None:
        Path("text.txt").write_text(text)
    error, hint = refusal(door(f"train {file}"), 2)
    assert error.startswith("input = 'text.txt' is not allowed: ")
    assert hint == "snugpt train --input builtin"
    assert not names_under(Path("runs"))


def test_a_plan_that_does_not_fit_exits_3_with_one_that_does(door: Door) -> None:
    done = door("train --gpu rtx-3060 --depth 48 --input text.txt")
    error, hint = refusal(done, 3)
    assert "does not fit" in error
    assert door(hint).code == 0
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card here")
@pytest.mark.parametrize("card", ["t4", "m1-8gb"])
def test_a_plan_for_a_card_that_is_not_here_is_refused(door: Door, card: str) -> None:
    file = plan_file(door, SMALL.replace("--gpu cpu", f"--gpu {card}"))
    error, hint = refusal(door(f"train {file}"), 1)
    assert "the plan is for" in error
    assert door(hint).code == 0
    assert not names_under(Path("runs"))


@pytest.mark.parametrize("blocked", ["runs", "runs/small"])
def test_a_file_where_the_folder_should_be_is_refused_and_kept(door: Door, blocked: str) -> None:
    Path(blocked).parent.mkdir(exist_ok=True)
    Path(blocked).write_text("mine")
    error, _ = refusal(door(TRAIN), 1)
    assert str(Path("runs/small")) in error
    assert Path(blocked).read_text() == "mine"


def test_a_folder_that_can_not_be_written_is_refused(door: Door) -> None:
    Path("runs").mkdir(mode=0o555)
    if os.access("runs", os.W_OK):
        pytest.skip("root writes anywhere")
    refusal(door(TRAIN), 1)
    assert not names_under(Path("runs"))


def test_another_run_of_that_name_is_refused_and_kept(door: Door) -> None:
    door(TRAIN)
    before = {name: Path("runs/small", name).read_bytes() for name in WHOLE_RUN}
    error, _ = refusal(door(TRAIN.replace("--num-iterations 3", "--num-iterations 4")), 1)
    assert "another recipe: total_tokens 384 there, 512 here" in error
    assert {name: Path("runs/small", name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--state-dtype bf16", "recipe: state_dtype fp32 there, bf16 here"),
        ("--seed 7", "recipe: seed 1337 there, 7 here"),
        (
            "--optimizer adamw --learning-rate 0.5 --state-dtype bf16",
            "recipe: optimizer muon there, adamw here; state_dtype fp32 there, bf16 here;"
            " learning_rate 0.0017320508075688772 there, 0.5 here",
        ),
        (
            "--total-batch-tokens 256 --learning-rate 0.5",
            "recipe: total_batch_tokens 128 there, 256 here; total_tokens 384 there, 768 here;"
            " learning_rate 0.0017320508075688772 there, 0.5 here",
        ),
        ("--layers 2", "shape: num_layers 1 there, 2 here"),
    ],
)
def test_a_run_of_that_name_with_another_lever_says_which(
    door: Door, monkeypatch: pytest.MonkeyPatch, more: str, named: str
) -> None:
    door(TRAIN)
    line = f"{TRAIN} {more}"
    monkeypatch.setattr("sys.argv", ["snugpt", *line.split()])
    error, hint = refusal(door(line), 1)
    assert error == f"runs/small holds a run with another {named}"
    assert hint.count("--name") == 1
    assert hint.endswith(f" {more} --name small-2")
    assert door(hint).code == 0


def test_out_of_memory_says_so_in_two_lines_and_the_command_it_hints_goes_on(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step, taken = snugpt.run.train.take_step, []

    def full_from_the_third(*arguments):
        if len(taken) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        taken.append(take_step(*arguments))
        return taken[-1]

    with monkeypatch.context() as full:
        full.setattr("snugpt.run.train.take_step", full_from_the_third)
        done = door(TRAIN.replace("--num-iterations 3", "--num-iterations 6"))
    error, hint = refusal(done, 3)
    assert "step 2 is saved and verified" in error
    assert len([text for text in done.err.splitlines() if "taken again" in text]) == 2
    assert hint.startswith("snugpt train ")
    resumed = door(hint)
    assert resumed.code == 0, resumed.err
    assert "resumed after step 2" in resumed.err
    assert Path("runs/small/checkpoints/step-00000006").is_dir()


def _interrupted(line: str, number: signal.Signals) -> Done:
    """Run a command in a copy of this process, which has torch; signal it at its first step."""
    out, err = Path("out.txt"), Path("err.txt")
    child = os.fork()
    if not child:
        with suppress(BaseException):
            torch.set_num_threads(1)  # the worker threads of the parent do not exist here
            for path, stream in ((out, 1), (err, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            with open(1, "w", closefd=False) as sys.stdout, open(2, "w") as sys.stderr:
                code = run(shlex.split(line))
            os._exit(code)
        os._exit(70)
    ends_s = time.monotonic() + 60
    while not (err.exists() and "\nstep " in err.read_text()) and time.monotonic() < ends_s:
        time.sleep(0.005)
    os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Done(code, out.read_text(), err.read_text())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # 3.12, threads and fork
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_the_command_it_prints_goes_on_to_the_same_end(
    door: Door, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("snugpt.run.progress.LOG_EVERY_S", 0.0)
    line = TRAIN.replace("--num-iterations 3", "--num-iterations 400 --save-every 1000")
    stopped = _interrupted(line, signal.Signals[name])
    assert stopped.code == 128 + signal.Signals[name], stopped.err
    assert "Traceback" not in stopped.err
    told = re.search(rf"^{name}: saved after step (\d+); go on with\n  (.*)$", stopped.err, re.M)
    assert told is not None, stopped.err
    step = int(told[1])
    assert 0 < step < 400
    assert [path.name for path in Path("runs/small/checkpoints").iterdir()] == [f"step-{step:08d}"]
    resumed = door(told[2])
    assert resumed.code == 0
    assert f"resumed after step {step}" in resumed.err
    assert "encoding" not in resumed.err
    assert Path("runs/small/checkpoints/step-00000400").is_dir()


STEP_LINE = "step      {}/1000  loss 3.142  61.0 s left  12,346 tok/s"


def _report(step: int) -> StepReport:
    return StepReport(
        step=step, num_steps=1000, loss=3.14159, tokens_per_s=12345.6, mfu=0.42, seconds_left=61.0,
        allocated_bytes=GIB, reserved_bytes=GIB,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (90, f"{STEP_LINE}  peak 1.00 GiB (25%)  MFU 42%"),
        (80, f"{STEP_LINE}  peak 1.00 GiB (25%)"),
        (60, STEP_LINE),
        (10, "step     "),
    ],
)
def test_on_a_terminal_one_line_is_written_over_and_never_wraps(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    shown: str,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = TrainingScreen(4 * GIB)
    screen(_report(1))
    screen(_report(2))
    screen(EvaluationReport(step=2, bits_per_byte=2.5))
    screen(_report(3))
    screen.close()
    screen.close()
    evaluation = "step      2  validation 2.5000 bits/byte"
    written = [line.split("\r\x1b[K") for line in capsys.readouterr().err.split("\n")]
    assert written == [
        ["", shown.format(1), shown.format(2), evaluation], ["", shown.format(3)], [""],
    ]  # fmt: skip


def test_in_a_file_the_first_step_the_last_and_one_in_a_while_are_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr("snugpt.cli.training_screen.time.monotonic", lambda: now_s)
    screen = TrainingScreen(4 * GIB)
    for percent in range(100):
        screen(Notice(text=f"encoding {percent}%"))
    for step in range(1, 1001):
        now_s += 0.0625
        screen(_report(step))
    screen.close()
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "encoding"
    steps = [int(line.split()[1].partition("/")[0]) for line in lines]
    assert steps == [160, 320, 480, 640, 800, 960, 1000]


NEEDS_TORCH = """
import sys
sys.modules[{missing!r}] = None
from snugpt.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("missing", ["torch", "numpy", "tokenizers", "safetensors"])
@pytest.mark.parametrize("line", [TRAIN, "generate small", "demo"])
def test_without_what_the_verb_needs_it_says_what_to_install(
    elsewhere: Path, line: str, missing: str
) -> None:
    if missing != "torch" and line != TRAIN:
        pytest.skip("once is enough")
    done = subprocess.run(
        [sys.executable, "-c", NEEDS_TORCH.format(missing=missing), *line.split()],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    error, hint = refusal(Done(done.returncode, done.stdout, done.stderr), 1)
    assert f"needs {missing}" in error
    assert hint == "pip install 'snugpt[train]'"
    assert not Path("runs").exists()

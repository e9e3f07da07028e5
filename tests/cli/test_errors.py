"""Bad input: one error line that names field and range, one hint that works, the exit code."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snugpt.cli.main import VERBS, run
from snugpt.errors import BadQuestionError, SnugError
from snugpt.planner.answer import answer, question_of
from snugpt.spec.plan import encode_plan
from snugpt.spec.question import RANGES, Question

BAD = {
    "plan --gpu rtx-4091": "did you mean 'rtx-4090'",
    "plan --gpu ''": "unknown GPU",
    "plan --gpu t4 --depth 0": "depth = 0 is not allowed: 1 to 1024",
    "plan --gpu t4 --depth twelve": "'--depth'",
    "plan --gpu t4 --depth": "--depth",
    "plan --gpu t4 --hours nan": "hours = nan",
    "plan --gpu t4 --hours inf": "hours = inf",
    "plan --gpu t4 --depth 4 --learning-rate nan": "learning_rate = nan",
    "plan --gpu t4 --width 512 --heads 5": "num_heads = 5",
    "plan --gpu t4 --depth 4 --total-batch-tokens 500000": "499712 and 501760",
    "plan --gpu t4 --depth 4 --device-batch-size 3 --total-batch-tokens 65536": "61440 and 67584",
    "plan --gpu t4 --dpeth 4": "did you mean '--depth'",
    "plan --gpu t4 --depth 4 --checkpoint block": "'blocks'",
    "plan --gpu t4 --depth 4 --compute-dtype bf16": "no bf16",
    "plan --gpu t4 --preset 150N": "did you mean '150M'",
    "plan --gpu t4 --depth 4 --batch 2": "batch = 2 decides nothing",
    "plan --gpu t4 --depth 4 --task generate --hours 2": "hours",
    "plan --gpu t4 --task generate": "needs a model, a preset or a depth",
    "plan --gpu t4 --task generate --depth 4 --prompt-tokens 9999": "context",
    "plan --gpu t4 --depth 4 --layers 4 --width 64": "depth = 4 decides nothing",
    "plan --gpu t4 --depth 4 --reserve -1": "reserve",
    "plan --gpu t4 --depth 4 --input /no/such/file": "no such file",
    "plan --gpu t4 --depth 4 --window-pattern SXL": "window_pattern",
    "plan --gpu t4 --preset tiny_char --vocab-size 300 --byte-tokens": "one token per byte",
    "plan --gpu t4 --depth 4 --warmup-fraction 0.8": "warmup_fraction",
    "plan --gpu t4 --width 65536 --layers 1024 --device-batch-size 9999999": "any machine",
    "plan --stack nanochat@2025-9 --gpu h100 --depth 4": "did you mean 'nanochat@2025-10'",
    "plan --stack nanochat --gpu t4 --depth 4": "capability 8.0 and up",
    "plan --stack nanochat --gpu h100 --depth 4 --checkpoint blocks": "it has none only",
    "plan --stack nanochat --gpu h100 --depth 4 --loss chunked": "it has plain only",
    "plan --stack nanochat --gpu h100 --depth 4 --optimizer adamw": "it has muon only",
    "plan --stack nanochat --gpu h100 --depth 4 --preset d12": "preset = 'd12' is not an option",
    "plan --stack nanochat --gpu h100 --depth 4 --clip-norm 1": "clip_norm = 1.0 is not an option",
    "plan --stack nanochat --gpu h100 --task generate --depth 4": "for training only",
    "plan --stack nanochat@2025-10 --gpu h100 --depth 4 --fp8": "--fp8 is not an option",
    "plan --stack nanochat@2026-02 --gpu h100 --depth 4 --fp8": "torchao",
    "plan --stack nanochat@2026-03 --gpu a100-80gb --depth 4 --fp8": "has no FP8",
    "plan --stack nanochat@2025-10 --gpu h100 --depth 5": "3 heads there",
    "plan --stack nanochat@2025-10 --gpu h100 --depth 4 --window-pattern L": "no such option",
    "plan --stack nanochat@2025-10 --gpu h100 --depth 4 --tokens-per-param 8.5": "whole numbers",
    "plan --stack nanochat --gpu h100 --depth 4 --num-gpus 3": "num_gpus = 3 is not allowed",
    "plan --stack nanochat --gpu h100 --depth 4 --num-gpus 9": "num_gpus = 9 is not allowed: 1",
    "plan --stack nanochat --gpu h100 --num-gpus 8 --launcher python": "started by torchrun",
    "plan --gpu h100 --depth 4 --sharding full": "it is for several GPUs",
    "plan --gpu a100-40gb --depth 4 --fp8": "fp8 = 'on' is not allowed: the card has no FP8",
    "plan --gpu cpu --depth 4 --fp8": "fp8 = 'on' is not allowed: there are no FP8 products",
    "plan --gpu h100 --depth 4 --fp8 --seq-len 1000": "multiples of 16, and seq_len is 1000",
    "plan --gpu h100 --depth 4 --fp8 --compile on": "fp8 = 'on' is not allowed: a compiled layer",
    "plan --gpu t4 --depth 4 extra": "extra",
    "plna": "did you mean 'plan'",
    "--nonsense": "--nonsense",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_question_is_two_lines_and_exit_2(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(line)
    assert run([*argv, "--json", "-o", "plan.json"] if argv[0] == "plan" else argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []
    error, hint = printed.err.splitlines()
    assert error.startswith("error: ")
    assert BAD[line] in error
    assert hint.startswith("hint: ")
    _hint_works(hint, capsys)


def _hint_works(hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A hint is a command of ours that is answered, be it that it does not fit."""
    words = shlex.split(hint.removeprefix("hint: "))
    assert words[0] == "snugpt"
    if words[1] in VERBS and words[1] in ("plan", "gpus"):
        assert run(words[1:]) in (0, 3)
        capsys.readouterr()


@pytest.mark.parametrize("total", [499_712, 501_760])
def test_both_nearest_batches_work(total: int, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--gpu", "t4", "--depth", "4", "--total-batch-tokens", str(total)]
    assert run(["plan", *flags]) == 0
    assert f"{total:,} tokens" in capsys.readouterr().out


def test_no_colour_codes_where_nobody_sees_them(capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", "--gpu", "nothing"])
    assert "\x1b" not in capsys.readouterr().err


def test_an_interrupt_exits_130_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("snugpt.cli.plan.answer", interrupted)
    assert run(["plan", "--gpu", "t4"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_help_fits_a_screen_and_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert any("snugpt plan --gpu rtx-4090 --depth 12" in line for line in lines)
    assert run(["plan", "--help"]) == 0
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


def test_python_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    for fields in ({"dpeth": 4}, {"depth": "4"}, {"depth": 0}, {"hours": float("nan")}):
        with pytest.raises(BadQuestionError):
            question_of(fields)


def _number(low: float, high: float, whole: bool) -> st.SearchStrategy[Any]:
    """Mostly small, sometimes the extremes, sometimes beyond."""
    if whole:
        near = st.integers(int(low), int(min(high, low + 64)))
        powers = st.integers(0, 40).map(lambda n: min(2**n, max(int(high), 2048)))
        return near | powers | st.integers(int(low) - 1, int(high) + 1)
    return st.floats(low, min(high, 10.0)) | st.sampled_from([low, high, float("nan"), -1.0])


WHOLE = {name for name, kind in Question.__annotations__.items() if "int" in str(kind)}
CHOICES: dict[str, list[Any]] = {
    "task": ["train", "train", "generate"],
    "gpu": ["t4", "rtx-4090", "h200", "gtx-1060-6gb", "m1-8gb", "nope"],
    "style": ["nanochat", "llama", "gpt2"],
    "preset": ["tiny", "tiny_char", "150M_1024", "d8", "tinny"],
    "tie": [True, False],
    "byte_tokens": [True, False],
    "window_pattern": ["L", "SL", "SSSL", "", "Q"],
    "compute_dtype": ["fp32", "bf16"],
    "weight_dtype": ["fp32", "bf16"],
    "loss": ["chunked", "plain"],
    "checkpoint": ["none", "blocks"],
    "optimizer": ["muon", "adamw"],
    "objective": ["speed", "memory"],
    "stack": ["snugpt", "nanochat", "nanochat@2025-10", "nanochat@2026-03", "nanogpt"],
    "launcher": ["python", "torchrun"],
    "fp8": [True, False],
}
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **{name: st.sampled_from(values) for name, values in CHOICES.items()},
    **{name: _number(low, high, name in WHOLE) for name, (low, high) in RANGES.items()},
}


@st.composite
def questions(draw: st.DrawFn) -> dict[str, Any]:
    """A machine, a model, and up to five other fields with whatever in them."""
    fields = {"gpu": draw(FIELDS["gpu"]), "depth": draw(st.integers(1, 32))}
    if draw(st.booleans()):
        fields["stack"] = draw(FIELDS["stack"])
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=5, unique=True))
    fields |= {name: draw(FIELDS[name]) for name in names}
    if draw(st.booleans()):
        del fields["depth"]
    return fields


@settings(max_examples=160, deadline=None, derandomize=True)
@given(questions())
def test_any_question_is_answered_or_refused_in_one_line(fields: dict[str, Any]) -> None:
    refused: SnugError | None = None
    try:
        made = answer(question_of(fields), num_alternatives=1)
    except SnugError as error:
        refused = error
    if refused is not None:
        assert "\n" not in refused.message
        return
    encode_plan(made)
    assert made.fits == (made.memory.process_bytes.high <= made.memory.capacity_bytes)
    assert sum(term.bytes for term in made.memory.terms) == made.memory.allocated_bytes
    assert all(other.memory.fits for other in made.alternatives)
    assert made.fits or made.alternatives

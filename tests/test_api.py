"""`import snugpt`: the verbs as functions, the same answers, nothing heavy before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

import snugpt
from snugpt.cli.main import run
from snugpt.ledger.store import read_all
from snugpt.spec.plan import Plan


def in_a_child(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ("--gpu rtx-4090 --depth 12", {"gpu": "rtx-4090", "depth": 12}),
        (
            "--gpu t4 --preset tiny --tokens-per-param 5 --no-tie",
            {"gpu": "t4", "preset": "tiny", "tokens_per_param": 5, "tie": False},
        ),
        (
            "--gpu gtx-1070 --preset 150M --task generate --batch 3",
            {"gpu": "gtx-1070", "preset": "150M", "task": "generate", "batch": 3},
        ),
        ("--gpu rtx-3060 --depth 48", {"gpu": "rtx-3060", "depth": 48}),
    ],
)
def test_a_plan_is_the_one_of_the_command_line(
    capsys: pytest.CaptureFixture[str], flags: str, fields: dict[str, object]
) -> None:
    made = snugpt.plan(**fields)
    assert isinstance(made, Plan)
    assert run(["plan", *flags.split(), "--json"]) == (0 if made.fits else 3)
    assert json.loads(capsys.readouterr().out) == json.loads(msgspec.json.encode(made))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gpu": "t4", "dpeth": 4}, "did you mean 'depth'"),
        ({"gpu": "rtx-4091", "depth": 4}, "did you mean 'rtx-4090'"),
        ({"gpu": "t4", "preset": "tinny"}, "did you mean 'tiny'"),
        ({"gpu": "t4", "depth": "4"}, "depth"),
        ({"gpu": "t4", "depth": 0}, "depth = 0 is not allowed: 1 to 1024"),
        ({"gpu": "t4", "hours": float("nan")}, "hours = nan"),
    ],
)
def test_a_wrong_field_is_a_bad_question_with_a_hint(fields: dict[str, object], said: str) -> None:
    with pytest.raises(snugpt.BadQuestionError) as caught:
        snugpt.plan(**fields)
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert isinstance(caught.value, snugpt.SnugError)


def test_a_memory_report_is_one_line_that_says_which_counter() -> None:
    line = str(snugpt.memory_report())
    assert "\n" not in line
    assert "process " in line
    assert "GiB" in line


def test_watch_around_a_loop_leaves_a_measurement_and_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    model = torch.nn.Linear(1 << 10, 1 << 10)
    optimizer = torch.optim.AdamW(model.parameters())
    with snugpt.Watch("my loop", device="cpu") as watch:
        for _ in range(3):
            model(torch.ones(4, 1 << 10)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            watch.step(tokens=4)
    found = watch.measurement
    assert found is not None
    assert (found.program, found.outcome, found.steps) == ("my loop", "fit", 3)
    assert found.allocated_bytes is not None
    assert found.allocated_bytes >= 4 * 4 * (1 << 20)  # weights, gradients, two moments
    assert found.tokens_per_s is not None
    assert read_all(tmp_path / "snugpt") == [found]
    assert run(["records"]) == 0
    assert capsys.readouterr().out.startswith("1 measurement,")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'snugpt' has no attribute 'palm'"):
        _ = snugpt.palm
    assert not hasattr(snugpt, "__path_of_no_verb__")


def test_every_name_it_promises_is_there() -> None:
    assert all(callable(getattr(snugpt, name)) for name in snugpt.__all__)


def test_importing_and_planning_load_nothing_heavy() -> None:
    heavy = "[n for n in ('torch', 'numpy', 'click', 'rich', 'tokenizers') if n in sys.modules]"
    code = f"import sys, snugpt; snugpt.plan(gpu='t4', depth=2); print({heavy})"
    assert in_a_child(code) == "[]"
    code = "import sys, snugpt; print([n for n in sys.modules if n.startswith('snugpt')])"
    assert in_a_child(code) == "['snugpt.errors', 'snugpt']"


NEEDS = """
import sys
sys.modules["torch"] = None
import snugpt
assert snugpt.plan(gpu="t4", depth=2).fits
try:
    snugpt.{verb}
except snugpt.FailedError as error:
    print(error.message, error.hint, sep="|")
"""


@pytest.mark.parametrize("verb", ["memory_report", "Watch"])
def test_without_torch_a_verb_says_what_to_install_and_plans_go_on(verb: str) -> None:
    assert in_a_child(NEEDS.format(verb=verb)) == (
        f"snugpt.{verb} needs torch|pip install 'snugpt[train]'"
    )

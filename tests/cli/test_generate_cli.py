"""`snugpt generate`: text on stdout as it comes; what can't be generated prints none of it."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from pathlib import Path

import pytest
from door import SMALL, Door, at_home_in, refusal

from snugpt.cli.main import run

GENERATE = "generate small --prompt 'a re' --max-new-tokens 12"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/small, trained once for all tests: three steps, of which two are kept."""
    home = tmp_path_factory.mktemp("trained")
    with at_home_in(home):
        assert run(shlex.split(f"train {SMALL} --num-iterations 3 --name small --json")) == 0
    return home / "runs"


@pytest.fixture(autouse=True)
def runs(trained: Path, elsewhere: Path) -> Path:
    """A copy of the run to spoil."""
    return Path(shutil.copytree(trained, elsewhere / "runs"))


def test_the_prompt_and_its_continuation_are_all_of_stdout(door: Door) -> None:
    done = door(GENERATE)
    assert done.code == 0
    assert done.out.startswith("a re")
    assert len(done.out) > len("a re\n")
    assert done.out.endswith("\n")
    assert done.err == ""


@pytest.mark.parametrize("flags", ["", "--temperature 0", "--top-k 0 --top-p 0.9 --seed 3"])
def test_streamed_text_is_the_text_of_a_sample(door: Door, flags: str) -> None:
    streamed = door(f"{GENERATE} {flags}").out
    sample = json.loads(door(f"{GENERATE} {flags} --json").out)
    assert streamed == sample["prompt"] + sample["text"] + "\n"


def test_the_same_seed_gives_the_same_text(door: Door) -> None:
    first, again, other = (door(f"{GENERATE} --seed {seed}").out for seed in (1, 1, 2))
    assert first == again != other


def test_a_path_is_as_good_as_a_name(door: Door) -> None:
    assert door(GENERATE.replace("small", "runs/small")) == door(GENERATE)


def test_the_prompt_may_come_from_standard_input(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a re"))
    assert door("generate small --prompt - --max-new-tokens 12") == door(GENERATE)


def test_json_is_one_line_per_sample(door: Door) -> None:
    done = door(f"{GENERATE} --num-samples 3 --json")
    samples = [json.loads(line) for line in done.out.splitlines()]
    assert [sample["sample"] for sample in samples] == [1, 2, 3]
    assert {sample["prompt"] for sample in samples} == {"a re"}
    assert len({sample["text"] for sample in samples}) > 1
    assert done.err == ""


def test_samples_are_told_apart_by_their_number(door: Door) -> None:
    texts = [json.loads(line)["text"] for line in door(f"{GENERATE} --num-samples 2 --json").out
             .splitlines()]  # fmt: skip
    assert door(f"{GENERATE} --num-samples 2").out == "".join(
        f"--- {number}\na re{text}\n" for number, text in enumerate(texts, 1)
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--temperature nan", "temperature = nan is not allowed: 0 to 100"),
        ("--temperature -1", "temperature = -1.0"),
        ("--temperature inf", "temperature = inf"),
        ("--top-k -1", "top_k = -1"),
        ("--top-p 0", "top_p = 0.0 is not allowed: above 0, up to 1"),
        ("--top-p 2", "top_p = 2.0"),
        ("--top-p nan", "top_p = nan"),
        ("--max-new-tokens 0", "max_new_tokens = 0 is not allowed: at least 1"),
        ("--max-new-tokens many", "--max-new-tokens"),
        ("--num-samples 0", "num_samples = 0 is not allowed: 1 to 4096"),
        ("--num-samples 5000", "num_samples = 5000"),
        ("--seed -1", "seed = -1"),
        (f"--seed {1 << 70}", "seed = "),
        (f"--prompt '{'word ' * 40}'", "the model's context is 32"),
        ("--prompt \udcff", "lone surrogate"),
        ("--tempreature 1", "did you mean '--temperature'"),
    ],
)
@pytest.mark.parametrize("output", ["", "--json"])
def test_a_value_that_can_not_be_is_refused_before_anything_is_printed(
    door: Door, flags: str, named: str, output: str
) -> None:
    done = door(f"{GENERATE} {flags} {output}")
    error, hint = refusal(done, 2)
    assert named in error
    assert done.out == ""
    if "NAME" not in hint:
        assert door(hint).code == 0


@pytest.mark.parametrize("name", ["smal", "none", "''", "runs", "'a\0b'", "text.txt", "z" * 5000])
def test_an_unknown_name_is_refused_with_those_there_are(door: Door, name: str) -> None:
    error, hint = refusal(door(f"generate {name}"), 2)
    assert "no trained model" in error
    assert "small" in error
    assert hint == "snugpt generate small"
    assert door(hint).code == 0


def test_where_nothing_was_trained_the_demo_is_hinted(door: Door, runs: Path) -> None:
    shutil.rmtree(runs)
    error, hint = refusal(door("generate small"), 2)
    assert error == "no trained model 'small'"
    assert hint == "snugpt demo"


def flip_a_bit(runs: Path, step: int) -> None:
    file = runs / f"small/checkpoints/step-{step:08d}/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_costs_one_line_and_the_one_before_generates(
    door: Door, runs: Path
) -> None:
    flip_a_bit(runs, 3)
    done = door(GENERATE)
    assert done.code == 0
    assert done.out.startswith("a re")
    (line,) = done.err.splitlines()
    assert line.startswith("warning: checkpoint ")
    assert line.endswith("step-00000002 is used instead")
    assert (runs / "small/checkpoints/step-00000003").is_dir()  # readers move nothing


def test_where_every_checkpoint_is_damaged_nothing_is_generated(door: Door, runs: Path) -> None:
    flip_a_bit(runs, 2)
    flip_a_bit(runs, 3)
    done = door(GENERATE)
    error, _ = refusal(done, 1)
    assert "no checkpoint" in error
    assert done.out == ""
    assert len(done.err.splitlines()) == 2


def test_a_run_without_a_checkpoint_says_how_to_get_one(door: Door, runs: Path) -> None:
    shutil.rmtree(runs / "small/checkpoints")
    error, hint = refusal(door(GENERATE), 1)
    assert "no checkpoint yet" in error
    assert door(hint).code == 0
    assert door(GENERATE).code == 0


@pytest.mark.parametrize("name", ["plan.json", "tokenizer.json"])
def test_a_damaged_file_of_the_run_is_one_line(door: Door, runs: Path, name: str) -> None:
    file = runs / "small" / name
    file.write_bytes(file.read_bytes()[:-20])
    done = door(GENERATE)
    assert done.code in (1, 2)
    error, _ = refusal(done, done.code)
    assert name in error
    assert done.out == ""

"""The folder of a run: its name, its files, and lines that a kill left torn."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_plan import tiny_plan

from snugpt.errors import BadQuestionError, FailedError
from snugpt.run.run_folder import RunFolder, find_run, folder_for, training_recipe
from snugpt.spec.recipe import GenerationRecipe

careful = settings(deadline=None, derandomize=True)
TEXT = Path("text.txt")


def test_the_plan_is_written_once_and_read_back(tmp_path: Path) -> None:
    folder, plan = RunFolder(tmp_path / "runs" / "a"), tiny_plan(TEXT)
    folder.begin(plan, ("snugpt", "train", "--input", "my text.txt"))
    written = folder.plan_file.read_bytes()
    folder.begin(plan, ("snugpt", "train"))
    assert folder.plan() == plan
    assert folder.plan_file.read_bytes() == written
    lines = (folder.path / "argv").read_text().splitlines()
    assert lines == ["snugpt train --input 'my text.txt'", "snugpt train"]


def test_what_the_command_line_holds_may_be_any_bytes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(tiny_plan(TEXT), ("snugpt", "caf\udce9"))
    assert (folder.path / "argv").read_bytes() == b"snugpt 'caf\xe9'\n"


def test_a_folder_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(FailedError, match="could not write") as caught:
            RunFolder(path).begin(tiny_plan(TEXT), ())
        assert "\n" not in caught.value.message
        assert caught.value.hint


def test_metrics_come_back_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.metrics() == []
    for step in range(3):
        folder.log(kind="step", step=step, loss=step / 3)
    assert [line["loss"] for line in folder.metrics()] == [0.0, 1 / 3, 2 / 3]


@careful
@given(torn=st.integers(1, 40))
def test_a_line_cut_short_costs_itself_and_not_the_next(tmp_path_factory, torn: int) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    for step in (1, 2):
        folder.log(kind="step", step=step, loss=0.123456789012345)
    content = folder.metrics_file.read_bytes()
    folder.metrics_file.write_bytes(content[:-torn])
    folder.log(kind="step", step=3, loss=0.5)
    steps = [line["step"] for line in folder.metrics()]
    assert steps == ([1, 2, 3] if torn == 1 else [1, 3])


def test_metrics_that_can_not_be_written_are_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics_file.mkdir()
    with pytest.raises(FailedError, match=r"could not write .*metrics\.jsonl"):
        folder.log(step=1)


def test_the_same_plan_always_gets_the_same_folder_and_another_plan_another() -> None:
    plan = tiny_plan(TEXT)
    others = (tiny_plan(TEXT, steps=7), tiny_plan(TEXT, vocab=320), tiny_plan(Path("b.txt")))
    names = [folder_for(p, None).path for p in (plan, tiny_plan(TEXT), *others)]
    assert names[0] == names[1]
    assert len(set(names)) == 4
    assert names[0].name.startswith("nanochat-2x32-")
    assert find_refusal(names[0].name) is None


def find_refusal(name: str) -> BadQuestionError | None:
    try:
        folder_for(tiny_plan(TEXT), name)
    except BadQuestionError as error:
        return error
    return None


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "-x", ".hidden", "a\n", "é", "a" * 101]
)
def test_names_that_are_no_plain_folder_names_are_refused(name: str) -> None:
    error = find_refusal(name)
    assert error is not None
    assert error.hint
    assert "\n" not in error.message


def test_a_run_is_found_by_name_and_by_path(tmp_path: Path) -> None:
    RunFolder(tmp_path / "runs" / "mine").begin(tiny_plan(TEXT), ())
    assert find_run("mine", tmp_path / "runs").path == tmp_path / "runs" / "mine"
    assert find_run(str(tmp_path / "runs" / "mine"), tmp_path).path.name == "mine"


def test_a_run_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(BadQuestionError, match="no trained model 'mine'") as caught:
        find_run("mine", tmp_path)
    assert caught.value.hint == "snugpt demo"
    RunFolder(tmp_path / "other").begin(tiny_plan(TEXT), ())
    with pytest.raises(BadQuestionError, match="has other") as caught:
        find_run("mine", tmp_path)
    assert caught.value.hint == "snugpt generate other"


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "", "~"])
def test_names_no_file_can_have_are_refused_too(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadQuestionError, match="no trained model"):
        find_run(name, tmp_path)


def test_a_plan_to_generate_can_not_be_trained() -> None:
    recipe = GenerationRecipe(
        batch=1, prompt_tokens=1, max_new_tokens=1, kv_dtype="fp32", weight_dtype="fp32"
    )
    with pytest.raises(BadQuestionError, match="for generating"):
        training_recipe(msgspec.structs.replace(tiny_plan(TEXT), recipe=recipe))

"""What is said before a run that can't compile its layers begins."""

from __future__ import annotations

import importlib.util

import msgspec
import pytest
from tiny_plan import tiny_plan, write_text

import snugpt
from snugpt.errors import BadQuestionError
from snugpt.run.readiness import refuse_levers, runnable
from snugpt.run.run_folder import training_recipe


@pytest.fixture
def compiled_plan():
    return snugpt.plan(gpu="rtx-4090", depth=4, compile="on")


def test_without_triton_the_way_out_is_named(compiled_plan, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadQuestionError, match="Triton") as refused:
        refuse_levers(compiled_plan, training_recipe(compiled_plan))
    hint = refused.value.hint
    assert hint.startswith("snugpt train ")
    assert hint.endswith("--compile off")


def test_with_triton_nothing_is_refused(compiled_plan, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    refuse_levers(compiled_plan, training_recipe(compiled_plan))


def test_a_plan_edited_to_compile_on_the_cpu_is_refused(tmp_path):
    plan = tiny_plan(write_text(tmp_path / "text.txt"))
    recipe = msgspec.structs.replace(training_recipe(plan), compile="on")
    with pytest.raises(BadQuestionError, match="CUDA"):
        runnable(msgspec.structs.replace(plan, recipe=recipe), lambda report: None)

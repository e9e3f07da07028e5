"""What is said before a run that can't compile its layers begins."""

from __future__ import annotations

import importlib.util

import msgspec
import pytest
from tiny_plan import tiny_plan, write_text

import snugpt
from snugpt.errors import BadQuestionError, DoesNotFitError
from snugpt.run import readiness
from snugpt.run.readiness import refuse_host_memory, refuse_levers, runnable
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


@pytest.mark.parametrize("offload", ["optimizer", "activations"])
def test_a_host_without_room_for_what_is_pinned_is_named_before_the_run(offload):
    plan = snugpt.plan(gpu="rtx-4090", depth=12, offload=offload)
    recipe, needed = training_recipe(plan), plan.host.ram_bytes
    refuse_host_memory(plan, recipe, needed)
    with pytest.raises(DoesNotFitError, match="of host memory") as refused:
        refuse_host_memory(plan, recipe, needed - 1)
    assert refused.value.hint.startswith("snugpt train ")
    assert "--offload none" in refused.value.hint


def test_without_offload_the_host_is_not_asked():
    plan = snugpt.plan(gpu="rtx-4090", depth=12, offload="none")
    refuse_host_memory(plan, training_recipe(plan), 0)


def test_the_host_is_looked_at_where_the_plans_card_is_here(monkeypatch):
    plan = snugpt.plan(gpu="rtx-4090", depth=12, offload="optimizer")
    monkeypatch.setattr(readiness.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(readiness, "cpu_capacity_bytes", lambda: 2**30)
    with pytest.raises(DoesNotFitError, match=r"1\.00 GiB are available"):
        runnable(plan, lambda report: None)

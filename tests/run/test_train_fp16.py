"""A run in fp16: the scale of its loss is in the metrics and in checkpoints.

Plans for a CPU are refused in fp16; here the refusal is taken away, and the CPU computes in it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from test_train_interrupts import after
from tiny_plan import run_tiny, tiny_plan, write_text

from snugpt.errors import BadQuestionError, FailedError
from snugpt.estimate.memory import memory_estimate
from snugpt.model import loss_scale
from snugpt.model.gpt import GPT
from snugpt.run.checkpoint import load_newest
from snugpt.run.generate import generation_dtype, generation_runtime, load_model
from snugpt.run.run_folder import RunFolder
from snugpt.spec.plan import Plan

FIRST_SCALE = 2.0**36  # overflows for some steps


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr("snugpt.run.progress.LOG_EVERY_S", 0.0)
    monkeypatch.setattr("snugpt.run.readiness.why_not", lambda *_: None)
    monkeypatch.setattr(loss_scale, "START", FIRST_SCALE)
    plain = tiny_plan(write_text(tmp_path / "text.txt"), steps=24, save_every_steps=100)
    recipe = msgspec.structs.replace(plain.recipe, compute_dtype="fp16")
    threads = torch.get_num_threads()
    memory = memory_estimate(plain.shape, recipe, plain.gpu, num_threads=threads)
    return msgspec.structs.replace(plain, recipe=recipe, memory=memory)


def steps_of(folder: RunFolder) -> list[dict]:
    return [line for line in folder.metrics() if line["kind"] == "step"]


def test_the_scale_and_the_steps_not_taken_are_in_the_metrics(plan, tmp_path):
    steps = steps_of(run_tiny(plan, tmp_path / "run").folder)
    scales = [FIRST_SCALE, *(line["loss_scale"] for line in steps)]
    skipped = [0, *(line["skipped_steps"] for line in steps)]
    assert 0 < skipped[-1] < len(steps)
    for i in range(len(steps)):
        halved = skipped[i + 1] == skipped[i] + 1
        assert scales[i + 1] == (scales[i] / 2 if halved else scales[i])


@pytest.mark.parametrize("stop", [3, 20])
def test_a_resumed_run_goes_on_with_its_scale(plan, tmp_path, stop):
    whole = run_tiny(plan, tmp_path / "whole" / "run").folder
    path = tmp_path / "stopped" / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "loss", after(2 * stop, GPT.loss, "SIGINT"))
        assert run_tiny(plan, path).steps == stop
    kept = load_newest(path / "checkpoints").state["loss_scale"]
    last = steps_of(RunFolder(path))[-1]
    assert [kept[0], kept[2]] == [last["loss_scale"], last["skipped_steps"]]
    resumed = run_tiny(plan, path).folder
    told = ("step", "loss", "loss_scale", "skipped_steps")
    found, expected = (
        [[line[key] for key in told] for line in steps_of(folder)] for folder in (resumed, whole)
    )
    assert found == expected


def test_gradients_that_always_overflow_end_the_run(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "START", 2.0)
    plain_loss = GPT.loss

    def spoiled(self, *arguments, **named):
        return plain_loss(self, *arguments, **named) * torch.inf

    monkeypatch.setattr(GPT, "loss", spoiled)
    monkeypatch.setattr(loss_scale.LossScale, "settle", finite_loss(loss_scale.LossScale.settle))
    with pytest.raises(FailedError, match="overflow fp16 however they are scaled"):
        run_tiny(plan, tmp_path / "run")


def finite_loss(settle):
    def settled(self, weights, clip_norm, optimizers, loss):
        settle(self, weights, clip_norm, optimizers, loss)
        loss.fill_(5.0)

    return settled


def test_fp16_on_a_cpu_is_refused(tmp_path):
    plain = tiny_plan(write_text(tmp_path / "text.txt"))
    recipe = msgspec.structs.replace(plain.recipe, compute_dtype="fp16")
    with pytest.raises(BadQuestionError, match="compute_dtype = 'fp16' is not allowed"):
        run_tiny(msgspec.structs.replace(plain, recipe=recipe), tmp_path / "run")


def test_a_trained_model_generates_with_weights_in_fp16(tmp_path):
    plan = tiny_plan(write_text(tmp_path / "text.txt"), steps=3)
    folder = run_tiny(plan, tmp_path / "run").folder
    half, full = load_model(folder, "fp16").model, load_model(folder).model
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert {weight.dtype for weight in half.parameters()} == {torch.float16}
    torch.testing.assert_close(
        half.hidden(tokens).float(), full.hidden(tokens), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize(
    ("capability", "asked", "dtype", "attention"),
    [
        ((6, 1), None, "fp16", "efficient"),
        ((7, 5), None, "fp16", "efficient"),
        ((8, 6), None, "bf16", "flash"),
        ((8, 6), "fp16", "fp16", "efficient"),
        ((8, 6), "fp32", "fp32", "efficient"),
    ],
)
def test_generation_takes_fp16_where_there_is_no_bf16(
    capability, asked, dtype, attention, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    runtime = generation_runtime(torch.device("cuda"), asked)
    assert (asked or generation_dtype(runtime), runtime.attention) == (dtype, attention)

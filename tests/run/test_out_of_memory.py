"""Out of memory in a run: smaller micro-batches first, then a saved step, one line and exit 3."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny_plan import Seen, run_tiny, tiny_plan, write_text
from tiny_training import exit_code_of, fork

import snugpt.run.train as training
from snugpt.errors import DoesNotFitError
from snugpt.ledger.store import read_all
from snugpt.model.adamw import AdamW
from snugpt.run.checkpoint import load_newest
from snugpt.run.reports import Notice, StepReport
from snugpt.run.run_folder import RunFolder
from snugpt.spec.plan import Plan

MMAP_THRESHOLD = -3  # of glibc's mallopt
FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes."
CAUSES = {
    "cpu": lambda: RuntimeError(FULL),
    "python": lambda: MemoryError(),
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture(autouse=True)
def _every_step_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snugpt.run.progress.LOG_EVERY_S", 0.0)


def with_rows(plan: Plan, batch: int, steps: int = 1, num_steps: int = 6) -> Plan:
    """The plan with another micro-batch, predicted for it."""
    tokens = batch * steps * plan.recipe.seq_len
    recipe = msgspec.structs.replace(
        plan.recipe, device_batch_size=batch, grad_accum_steps=steps, total_batch_tokens=tokens,
        total_tokens=num_steps * tokens,
    )  # fmt: skip
    memory = training.memory_estimate(
        plan.shape, recipe, plan.gpu, num_threads=torch.get_num_threads()
    )
    return msgspec.structs.replace(plan, recipe=recipe, memory=memory)


def full_above(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    *,
    from_step: int = 1,
    phase: str = "loss",
    cause: Callable[[], BaseException] = CAUSES["cpu"],
) -> list[int]:
    """Let every micro-batch above `batch` run out of memory in a phase, from a step on.

    Returns the micro-batch of every try of a step.
    """
    take_step, tried = training.take_step, []
    finished = 0

    def limited(model, optimizers, recipe, batch_of, mark):
        nonlocal finished
        tried.append(recipe.device_batch_size)

        def mark_or_fail(name):
            mark(name)
            too_large = recipe.device_batch_size > batch and finished + 1 >= from_step
            if name == phase and too_large:
                raise cause()

        loss = take_step(model, optimizers, recipe, batch_of, mark_or_fail)
        finished += 1
        return loss

    monkeypatch.setattr(training, "take_step", limited)
    return tried


def losses(folder: RunFolder) -> list[float]:
    return [line["loss"] for line in folder.metrics() if line["kind"] == "step"]


@pytest.mark.parametrize(
    ("phase", "cause"),
    [("forward", "cpu"), ("loss", "python"), ("backward", "cuda"), ("clip", "cpu")],
)
def test_a_step_is_taken_again_at_half_the_micro_batch(
    tmp_path, text, monkeypatch, phase: str, cause: str
) -> None:
    plan, seen = with_rows(tiny_plan(text), 4), Seen()
    plain = run_tiny(plan, tmp_path / "plain" / "run").folder
    tried = full_above(monkeypatch, 2, from_step=3, phase=phase, cause=CAUSES[cause])
    result = run_tiny(plan, tmp_path / "run", seen)
    assert result.finished
    assert tried == [4, 4, 4, 2, 2, 2, 2]
    # The same rows and rates: only the order of a sum differs.
    assert losses(result.folder) == pytest.approx(losses(plain), rel=2e-5)
    (line,) = [m for m in result.folder.metrics() if m["kind"] == "out_of_memory"]
    assert (line["step"], line["phase"], line["device_batch_size"]) == (3, phase, 4)
    (told,) = [n.text for n in seen.of(Notice) if "out of memory" in n.text]
    assert told.startswith(f"out of memory in step 3 ({phase}): taken again with device_batch_size")
    assert "2 x grad_accum_steps 2, the same tokens" in told


def test_the_receipt_is_of_the_recipe_in_effect_and_the_ledger_has_both(
    tmp_path, text, monkeypatch
) -> None:
    plan = with_rows(tiny_plan(text), 4)
    full_above(monkeypatch, 2, from_step=3)
    result = run_tiny(plan, tmp_path / "run")
    first, last = read_all(tmp_path / "ledger")
    assert (first.outcome, first.recipe, first.ratios) == ("oom", plan.recipe, {})
    assert last == result.measurement
    assert (last.outcome, last.retries, last.recipe.device_batch_size) == ("fit", 1, 2)
    assert last.predicted.allocated_bytes < plan.memory.allocated_bytes
    assert last.ratios["allocated"] == pytest.approx(1.0, abs=1e-3)
    assert result.folder.plan() == plan


@pytest.mark.parametrize("step", [1, 2])
def test_a_receipt_after_a_retry_in_the_metered_steps_agrees_too(
    tmp_path, text, monkeypatch, step: int
) -> None:
    plan = with_rows(tiny_plan(text), 4)
    full_above(monkeypatch, 2, from_step=step)
    measurement = run_tiny(plan, tmp_path / "run").measurement
    assert measurement.ratios["allocated"] == pytest.approx(1.0, abs=1e-3)


def test_a_third_time_saves_the_last_good_step_and_exits_with_3(
    tmp_path, text, monkeypatch
) -> None:
    plan = with_rows(tiny_plan(text), 8)
    plain = run_tiny(plan, tmp_path / "plain" / "run").folder
    with monkeypatch.context() as limit:
        tried = full_above(limit, 1, from_step=4)
        with pytest.raises(DoesNotFitError, match=r"out of memory in step 4 \(loss\)") as caught:
            run_tiny(plan, tmp_path / "run")
    assert tried == [8, 8, 8, 8, 4, 2]
    assert caught.value.exit_code == 3
    assert "step 3 is saved and verified" in caught.value.message
    assert (caught.value.hint or "").startswith("snugpt train ")
    assert "--name run" in (caught.value.hint or "")
    assert [m.outcome for m in read_all(tmp_path / "ledger")] == ["oom"] * 3
    folder = RunFolder(tmp_path / "run")
    assert load_newest(folder.checkpoints).step == 3
    seen = Seen()
    assert run_tiny(plan, folder.path, seen).finished
    resumed = [n.text for n in seen.of(Notice) if n.text.startswith("resumed")]
    assert resumed == ["resumed after step 3 with device_batch_size 2, as memory ran out before"]
    assert losses(folder) == pytest.approx(losses(plain), rel=2e-5)


def test_a_resumed_run_has_no_retries_of_its_own(tmp_path, text, monkeypatch) -> None:
    plan = with_rows(tiny_plan(text), 8)
    with monkeypatch.context() as limit:
        full_above(limit, 1, from_step=4)
        with pytest.raises(DoesNotFitError):
            run_tiny(plan, tmp_path / "run")
    tried = full_above(monkeypatch, 1, from_step=1)
    with pytest.raises(DoesNotFitError):
        run_tiny(plan, tmp_path / "run")
    assert tried == [2]


def test_the_command_that_is_hinted_goes_on_where_the_run_stopped(
    tmp_path, text, monkeypatch
) -> None:
    plan = with_rows(tiny_plan(text), 8)
    with monkeypatch.context() as limit:
        full_above(limit, 1, from_step=4)
        with pytest.raises(DoesNotFitError) as caught:
            run_tiny(plan, tmp_path / "run")
    assert "--checkpoint " in caught.value.hint
    other = msgspec.structs.replace(
        plan, recipe=msgspec.structs.replace(plan.recipe, checkpoint="blocks")
    )
    seen = Seen()
    assert run_tiny(other, tmp_path / "run", seen).finished
    assert [notice.text for notice in seen.of(Notice)][-1] == "resumed after step 3"
    assert RunFolder(tmp_path / "run").plan().recipe == other.recipe


def test_one_sequence_is_not_halved(tmp_path, text, monkeypatch) -> None:
    plan = with_rows(tiny_plan(text), 1, 4)
    tried = full_above(monkeypatch, 0, from_step=2)
    with pytest.raises(DoesNotFitError, match="step 1 is saved and verified"):
        run_tiny(plan, tmp_path / "run")
    assert tried == [1, 1]


def test_half_an_update_is_never_saved(tmp_path, text, monkeypatch) -> None:
    plan = with_rows(tiny_plan(text, save_every_steps=2), 4)
    plain = run_tiny(plan, tmp_path / "plain" / "run").folder
    update = AdamW.step

    def full(self, *arguments):
        if self.num_steps == 3:  # Muon has updated by now
            raise CAUSES["cuda"]()
        return update(self, *arguments)

    message = r"out of memory in step 4 \(optimizer\).*step 2 is saved and verified"
    with monkeypatch.context() as limit:
        limit.setattr(AdamW, "step", full)
        with pytest.raises(DoesNotFitError, match=message):
            run_tiny(plan, tmp_path / "run")
    folder = run_tiny(plan, tmp_path / "run").folder
    newest = "step-00000006/model.safetensors"
    assert (folder.checkpoints / newest).read_bytes() == (plain.checkpoints / newest).read_bytes()


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, text, monkeypatch) -> None:
    def full(*arguments, **named):
        raise CAUSES["cpu"]()

    monkeypatch.setattr(training, "build_for_training", full)
    with pytest.raises(DoesNotFitError, match=r"before the first step.*no step was saved"):
        run_tiny(tiny_plan(text), tmp_path / "run")


def test_another_runtime_error_passes_through(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("expected scalar type Float")

    monkeypatch.setattr(training, "take_step", broken)
    with pytest.raises(RuntimeError, match="scalar type"):
        run_tiny(tiny_plan(text), tmp_path / "run")
    assert read_all(tmp_path / "ledger") == []


@pytest.mark.parametrize("style", ["nanochat", "gpt2"])
def test_a_run_killed_around_a_retry_ends_like_one_that_was_not(
    tmp_path, text, monkeypatch, style
) -> None:
    """Saved at 2, 4 and 6, out of memory at 3: killed in the midst of that, and after step 4."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plan, path = with_rows(tiny_plan(text, style), 4), tmp_path / "killed" / "run"
    with monkeypatch.context() as limit:
        full_above(limit, 2, from_step=3)
        whole = run_tiny(plan, tmp_path / "whole" / "run").folder
    moments: tuple[tuple[Any, str, int, int], ...] = (
        (training, "make_room", 3, 2),
        (training.MemoryMeter, "keep", 1, 2),  # a resumed leg has its first step at 3
        (training, "retry_line", 1, 2),
        (training.MemoryMeter, "again", 1, 2),
        (training, "set_rates", 1, 4),
    )
    for owner, name, from_step, saved in moments if style == "nanochat" else moments[::4]:
        number = 4 if name == "set_rates" else 1  # that of step 5: 3 is tried twice
        leg = fork(lambda o=owner, n=name, f=from_step, k=number: dies(plan, path, o, n, f, k))
        assert exit_code_of(leg) == -signal.SIGKILL
        assert load_newest(path / "checkpoints").step == saved
    ended = run_tiny(plan, path).folder  # without the limit: the checkpoint says what is in effect
    torch.set_num_threads(threads)
    newest = "step-00000006/model.safetensors"
    assert (ended.checkpoints / newest).read_bytes() == (whole.checkpoints / newest).read_bytes()


def dies(plan: Plan, path: Path, owner: Any, name: str, from_step: int, number: int) -> None:
    """Train in a child, out of memory from a step of its own on, until the n-th call."""
    full_above(pytest.MonkeyPatch(), 2, from_step=from_step)
    call, left = getattr(owner, name), number

    def fatal(*arguments, **named):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)

    setattr(owner, name, fatal)
    run_tiny(plan, path)


class TestMemoryThatReallyRunsOut:
    """A child may take so much address space and no more; PyTorch's allocator then fails itself."""

    ROWS, VOCAB = 256, 4096  # logits of a whole micro-batch: 128 MiB, more than a free heap has

    def plan(self, text: Path, rows: int) -> Plan:
        plan = tiny_plan(text, vocab=self.VOCAB, eval_every_steps=9, save_every_steps=9)
        plain = msgspec.structs.replace(plan.recipe, loss="plain")
        return with_rows(msgspec.structs.replace(plan, recipe=plain), rows, num_steps=3)

    def trained(
        self, tmp_path: Path, text: Path, room_for: int, after_step: int = 0
    ) -> dict[str, Any]:
        """Train with room for micro-batches of `room_for` rows and half as many again."""
        plan = self.plan(text, self.ROWS)
        room_bytes = self.plan(text, room_for * 3 // 2).memory.allocated_bytes
        told, path = tmp_path / "told.json", tmp_path / "run"
        few = self.plan(text, 2)
        leg = fork(lambda: self.limited(few, plan, path, room_bytes, after_step, told))
        assert exit_code_of(leg) == 0
        return json.loads(told.read_text())

    def limited(
        self, few: Plan, plan: Plan, path: Path, room_bytes: int, after_step: int, told: Path
    ) -> None:
        run_tiny(few, path.parent / "few")  # brings in what a first step loads, threads and all
        # Large blocks go back to the system when they are freed, whatever was freed before.
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 128 * 1024)
        build = training.build_for_training

        def leave_no_room() -> None:
            libc.malloc_trim(0)
            room = virtual_bytes() + room_bytes
            resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))

        def build_and_leave_no_room(*args, **kwargs):
            model = build(*args, **kwargs)
            if after_step == 0:
                leave_no_room()
            return model

        def watcher(report) -> None:
            if isinstance(report, StepReport) and report.step == after_step:
                leave_no_room()

        training.build_for_training = build_and_leave_no_room
        try:
            measured = run_tiny(plan, path, watcher).measurement
            result = {"steps": measured.steps, "retries": measured.retries}
            result["batch"] = measured.recipe.device_batch_size
        except DoesNotFitError as error:
            result = {"exit": error.exit_code, "message": error.message}
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        told.write_text(json.dumps(result))

    def test_half_the_micro_batch_fits(self, tmp_path, text) -> None:
        told = self.trained(tmp_path, text, self.ROWS // 2)
        assert told == {"steps": 3, "retries": 1, "batch": self.ROWS // 2}
        assert "can't allocate memory" in self.errors(tmp_path)[0]

    def test_a_quarter_fits(self, tmp_path, text) -> None:
        told = self.trained(tmp_path, text, self.ROWS // 4)
        assert told == {"steps": 3, "retries": 2, "batch": self.ROWS // 4}
        assert len(self.errors(tmp_path)) == 2

    def test_three_times_is_too_often(self, tmp_path, text) -> None:
        told = self.trained(tmp_path, text, self.ROWS // 16, after_step=1)
        assert told["exit"] == 3
        assert "step 1 is saved and verified" in told["message"]
        assert len(self.errors(tmp_path)) == 3
        assert load_newest(tmp_path / "run" / "checkpoints").step == 1
        assert run_tiny(self.plan(text, self.ROWS), tmp_path / "run").finished

    def errors(self, tmp_path: Path) -> list[str]:
        lines = RunFolder(tmp_path / "run").metrics()
        return [line["error"] for line in lines if line["kind"] == "out_of_memory"]


def virtual_bytes() -> int:
    """The address space of this process, which is what RLIMIT_AS bounds."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()

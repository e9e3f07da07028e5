"""A run that does not fit after all ends in one line, exit 3, and a measurement that says so."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from tiny_plan import run_tiny, tiny_plan, write_text

import snugpt.run.train as training
from snugpt.errors import DoesNotFitError
from snugpt.ledger.store import read_all
from snugpt.units import MIB


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def test_out_of_memory_is_recorded_keeps_checkpoints_and_hints_a_smaller_batch(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_step = training.take_step
    calls = []

    def full_at_the_fourth(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return take_step(*args, **kwargs)

    monkeypatch.setattr(training, "take_step", full_at_the_fourth)
    with pytest.raises(DoesNotFitError, match="out of memory in step 4") as caught:
        run_tiny(tiny_plan(text), tmp_path / "run")
    assert caught.value.exit_code == 3
    assert "--device-batch-size 1" in (caught.value.hint or "")
    assert [m.outcome for m in read_all(tmp_path / "ledger")] == ["oom"]
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    monkeypatch.undo()
    assert run_tiny(tiny_plan(text), tmp_path / "run").finished


def test_another_runtime_error_passes_through(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("expected scalar type Float")

    monkeypatch.setattr(training, "take_step", broken)
    with pytest.raises(RuntimeError, match="scalar type"):
        run_tiny(tiny_plan(text), tmp_path / "run")
    assert read_all(tmp_path / "ledger") == []


def test_the_allocator_that_really_runs_out_is_understood(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = training.build_for_training

    def build_and_leave_no_room(*args, **kwargs):
        model = build(*args, **kwargs)
        room = virtual_bytes() + 64 * MIB
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        return model

    before = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(training, "build_for_training", build_and_leave_no_room)
    plan = tiny_plan(text, vocab=300)
    try:
        with pytest.raises(DoesNotFitError, match="out of memory"):
            run_tiny(large(plan), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def virtual_bytes() -> int:
    """The address space of this process, which is what RLIMIT_AS bounds."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def large(plan):
    """The plan with a batch whose activations are above what is left: 4096 sequences of 32."""
    import msgspec

    recipe = msgspec.structs.replace(
        plan.recipe, device_batch_size=4096, grad_accum_steps=1,
        total_batch_tokens=4096 * 32, total_tokens=4096 * 32,
    )  # fmt: skip
    return msgspec.structs.replace(plan, recipe=recipe)

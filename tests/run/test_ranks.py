"""Several processes train as one does: the same losses, the same checkpoints, the same end."""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny_plan import Seen, run_tiny, tiny_plan, write_text

import snugpt.run.train as training
from snugpt.cli.main import run
from snugpt.errors import BadQuestionError, DoesNotFitError, SnugError
from snugpt.run.distributed import joined
from snugpt.run.reports import EvaluationReport, StepReport
from snugpt.run.tensor_file import opened
from snugpt.spec.plan import Plan, encode_plan
from two_processes import exit_codes, run_ranks

STEPS = 6
SHARDINGS = ("none", "optimizer", "full")
# fp32 sums in another order, over six steps of two tiny models; seen: 1e-6.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 5e-6, 2e-4


@pytest.fixture(autouse=True)
def _every_step_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snugpt.run.progress.LOG_EVERY_S", 0.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def on_two(plan: Plan, sharding: str) -> Plan:
    """The same steps, divided between two processes."""
    recipe = msgspec.structs.replace(
        plan.recipe, grad_accum_steps=plan.recipe.grad_accum_steps // 2, world_size=2,
        launcher="torchrun", sharding=sharding,
    )  # fmt: skip
    return msgspec.structs.replace(plan, recipe=recipe)


def curve(seen: Seen) -> tuple[list[float], list[float]]:
    losses = [report.loss for report in seen.of(StepReport)]
    return losses, [report.bits_per_byte for report in seen.of(EvaluationReport)]


def trained(plan: Plan, path: Path) -> tuple[list[float], list[float]]:
    seen = Seen()
    run_tiny(plan, path, seen)
    return curve(seen)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All that the last checkpoint holds."""
    newest = max((path / "checkpoints").glob("step-*"))
    found = {}
    for name in ("model", "optimizer"):
        with opened(newest / f"{name}.safetensors") as file:
            found |= {f"{name}:{key}": file.file.get_tensor(key) for key in file.names}
    return found


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.shape == other[name].shape, name
        torch.testing.assert_close(
            tensor, other[name], rtol=WEIGHT_TOLERANCE, atol=WEIGHT_TOLERANCE, msg=name
        )


def both(plan: Plan, path: Path, sharding: str, folder: Path) -> None:
    """Train to the end on two processes."""

    def work(rank: int) -> None:
        with joined():
            run_tiny(on_two(plan, sharding), path)

    run_ranks(work, folder)


def without_last(path: Path) -> Path:
    """Put a run back to the checkpoint before its last one."""
    newest = max((path / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)
    return path


@pytest.mark.parametrize(("style", "seeds"), [("nanochat", (1, 2, 3)), ("llama", (1,))])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, style, seeds) -> None:
    text = write_text(tmp_path / "text.txt")
    plans = {
        seed: tiny_plan(text, style, steps=STEPS, seed=seed, save_every_steps=9, eval_every_steps=9)
        for seed in seeds
    }
    alone = {seed: trained(plan, tmp_path / f"one-{seed}") for seed, plan in plans.items()}

    def work(rank: int) -> dict[tuple[int, str], Any]:
        with joined():
            return {
                (seed, sharding): trained(on_two(plan, sharding), tmp_path / f"{sharding}-{seed}")
                for seed, plan in plans.items()
                for sharding in SHARDINGS
            }

    first, second = run_ranks(work, tmp_path)
    for (seed, sharding), (losses, bits) in first.items():
        assert losses == pytest.approx(alone[seed][0], abs=LOSS_TOLERANCE)
        assert bits == pytest.approx(alone[seed][1], abs=LOSS_TOLERANCE)
        assert second[seed, sharding] == (losses, bits)
        assert_close(tensors(tmp_path / f"{sharding}-{seed}"), tensors(tmp_path / f"one-{seed}"))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, sharding) -> None:
    plan = tiny_plan(write_text(tmp_path / "text.txt"), steps=STEPS)
    one, two = tmp_path / "one", tmp_path / "two"
    run_tiny(plan, one)
    expected = tensors(one)
    both(plan, two, sharding, tmp_path)
    assert run_tiny(plan, without_last(two)).finished
    assert_close(tensors(two), expected)
    both(plan, without_last(one), sharding, tmp_path)
    assert_close(tensors(one), expected)


def test_a_resumed_run_drops_what_one_in_one_go_drops(tmp_path: Path) -> None:
    plan = tiny_plan(write_text(tmp_path / "text.txt"), "gpt2", steps=STEPS)
    both(plan, tmp_path / "run", "optimizer", tmp_path)
    expected = tensors(tmp_path / "run")
    both(plan, without_last(tmp_path / "run"), "optimizer", tmp_path)
    found = tensors(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_signal_to_one_rank_stops_both_at_the_same_step(tmp_path: Path) -> None:
    plan = tiny_plan(write_text(tmp_path / "text.txt"), steps=STEPS)

    def work(rank: int) -> tuple[int, str | None]:
        if rank == 1:
            kill_after(3, signal.SIGTERM)
        with joined():
            result = run_tiny(on_two(plan, "none"), tmp_path / "run")
        return result.steps, result.interrupted_by

    first, second = run_ranks(work, tmp_path)
    assert first == second == (3, "SIGTERM")
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").exists()


def kill_after(steps: int, number: signal.Signals) -> None:
    """Send this process a signal in its `steps`-th step."""
    take, left = training.take_step, [steps]

    def signalled(*arguments: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return take(*arguments)

    training.take_step = signalled


def ends(work: Any, folder: Path) -> tuple[list[int], list[str]]:
    """The exit codes of two ranks, and what each of them says as it ends."""

    def spoken(rank: int) -> None:
        try:
            with joined():
                work(rank)
        except SnugError as error:
            (folder / f"said-{rank}").write_text(error.message)
            raise SystemExit(error.exit_code) from None

    return exit_codes(spoken, folder, 2), [
        file.read_text() for file in sorted(folder.glob("said-*"))
    ]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_rank_ends_both_with_its_code_and_one_line(tmp_path: Path, failing) -> None:
    plan = tiny_plan(write_text(tmp_path / "text.txt"), steps=STEPS)

    def work(rank: int) -> None:
        def out_of_memory(*_: Any) -> torch.Tensor:
            raise MemoryError("DefaultCPUAllocator: can't allocate memory")

        if rank == failing:
            training.take_step = out_of_memory
        run_tiny(on_two(plan, "none"), tmp_path / "run")

    codes, said = ends(work, tmp_path)
    assert codes == [DoesNotFitError.exit_code] * 2
    assert len(said) == 1
    assert said[0].startswith("out of memory in step 1")
    assert list((tmp_path / "ledger").iterdir())


def test_an_error_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    plan = tiny_plan(write_text(tmp_path / "text.txt"), steps=STEPS)
    codes, said = ends(lambda rank: run_tiny(plan, tmp_path / "run"), tmp_path)
    assert codes == [BadQuestionError.exit_code] * 2
    assert said == ["world_size = 1 is not allowed: 2 processes were started"]


def test_a_rank_that_is_killed_takes_the_other_down(tmp_path: Path) -> None:
    plan = tiny_plan(write_text(tmp_path / "text.txt"), steps=STEPS)

    def work(rank: int) -> None:
        if rank == 1:
            kill_after(3, signal.SIGKILL)
        run_tiny(on_two(plan, "none"), tmp_path / "run")

    began_s = time.monotonic()
    codes, said = ends(work, tmp_path)
    assert codes == [1, -signal.SIGKILL]
    assert time.monotonic() - began_s < 30
    assert len(said) == 1
    assert said[0].startswith("another of the 2 processes ended without a word")


def test_a_plan_for_two_is_not_run_by_one(tmp_path: Path) -> None:
    plan = on_two(tiny_plan(write_text(tmp_path / "text.txt"), steps=STEPS), "none")
    with pytest.raises(BadQuestionError, match=r"world_size = 2 .* 1 process was") as refused:
        run_tiny(plan, tmp_path / "run")
    assert refused.value.hint == "torchrun --nproc-per-node 2 -m snugpt.cli train plan.json"
    assert not (tmp_path / "run").exists()


def test_only_the_first_rank_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = on_two(tiny_plan(write_text(tmp_path / "text.txt"), steps=STEPS), "full")
    (tmp_path / "plan.json").write_bytes(encode_plan(plan))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))

    def work(rank: int) -> tuple[int, str, str]:
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            code = run(["train", "plan.json", "--name", "two"])
        return code, out.getvalue(), err.getvalue()

    first, second = run_ranks(work, tmp_path)
    assert first[0] == second[0] == 0
    assert "predicted" in first[1]
    assert "generate with" in first[2]
    assert second[1:] == ("", "")

"""The GPU campaign rehearsed without a GPU: restarts, deaths, out of memory, the table."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import gpu_memory
from campaign import configurations, lever_set, records
from campaign.boundary import bisect
from campaign.children import OUR_PATH, run_child, this_script
from campaign.jobs import Environment, Job, Training, encode
from snugpt.estimate.stacks.catalogue import SNUGPT
from snugpt.ledger.own_records import Boundary
from snugpt.planner.pulled import PULLED
from snugpt.spec.measurement import measurement_from_json
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.units import MIB

BENCH = Path(gpu_memory.__file__).parent
SCALAR_BYTES = 64  # what the walk leaves out of clipping and the fused AdamW
ENVIRONMENT = {
    "python": "3", "platform": "p", "device": "a processor", "snugpt": "0", "gpu_id": None,
}  # fmt: skip
MEASURED = {
    "allocated_bytes": 3 * MIB, "phases": {"forward": {"allocated_bytes": 3 * MIB}},
    "step_ms": [2.0, 1.5], "num_threads": 1,
}  # fmt: skip


class Children:
    """Stands for the child processes: each is a Python that writes one result, or dies."""

    def __init__(self) -> None:
        self.started: list[Job] = []
        self.next_result: list[str | None] = []

    def __call__(self, job: Job, result: Path) -> list[str]:
        self.started.append(job)
        ends = None
        if not isinstance(job, Environment) and self.next_result:
            ends = self.next_result.pop(0)
        if ends == "killed":
            return [sys.executable, "-SEc", "import os; os.kill(os.getpid(), 9)"]
        if ends == "broken":
            return [sys.executable, "-SEc", "raise SystemExit('no such kernel')"]
        outcome = ends or "fit"
        found = {
            "outcome": outcome, "reason": None if outcome == "fit" else "full",
            "measured": MEASURED if outcome == "fit" else None, "environment": ENVIRONMENT,
        }  # fmt: skip
        code = f"open({str(result)!r}, 'w').write({json.dumps(found)!r})"
        return [sys.executable, "-SEc", code]


def campaign(out: Path, names: str, children: Any = this_script, **flags: Any) -> int:
    words = [f"--{key}={value}" for key, value in flags.items()]
    return gpu_memory.main(
        ["--device=cpu", f"--out={out}", f"--only={names}", *words], command=children
    )


def by_name(out: Path) -> dict[str, Any]:
    return records.newest(records.read(out))


def test_a_rehearsal_measures_what_was_predicted_and_prints_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu" / "eager.jsonl"
    assert campaign(out, "nano-d12-b8,scratch-attention") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["MiB", "asked", "alloc", "measured", "ratio", "ms", "h"]
    found = by_name(out)
    run = found["nano-d12-b8"]
    assert run["outcome"] == "fit"
    assert run["toy"]
    measurement = measurement_from_json(json.dumps(run["measurement"]))
    assert measurement.ratios["allocated"] == pytest.approx(1.0, abs=1e-3)
    assert run["phases"].keys() == run["measured"]["phases"].keys()
    for phase, predicted in run["phases"].items():
        counted = run["measured"]["phases"][phase]["allocated_bytes"]
        assert predicted == pytest.approx(counted, abs=64)
    assert (
        "aten::_scaled_dot_product_flash_attention_for_cpu" in run["measured"]["ran"]["operators"]
    )
    assert run["measured"]["missing"] == {}
    assert run["environment"]["torch"]
    backward = found["scratch-attention"]["measured"]["cases"][1]
    assert backward["scratch_bytes"] == backward["predicted_scratch_bytes"] > 0


def test_a_second_call_starts_nothing_that_is_done(tmp_path: Path) -> None:
    out, children = tmp_path / "r.jsonl", Children()
    assert campaign(out, "nano-d12-b8,llama-d12-b8-adamw", children) == 0
    assert len(children.started) == 3  # the machine, and two
    before = out.read_bytes()
    assert campaign(out, "nano-d12-b8,llama-d12-b8-adamw", children) == 0
    assert len(children.started) == 3
    assert out.read_bytes() == before
    assert campaign(out, "nano-d12-b8,gpt2-d12-b8-adamw", children) == 0
    assert [type(job).__name__ for job in children.started[3:]] == ["Environment", "Training"]


@pytest.mark.parametrize(
    ("ends", "reason"),
    [("killed", "killed by SIGKILL"), ("broken", "exit code 1 without a result: no such kernel")],
)
def test_a_child_that_dies_is_a_failed_record_and_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: str, reason: str
) -> None:
    out, children = tmp_path / "r.jsonl", Children()
    children.next_result = [ends]
    assert campaign(out, "nano-d12-b8,llama-d12-b8-adamw", children) == 0
    found = by_name(out)
    assert found["nano-d12-b8"]["outcome"] == "failed"
    assert found["nano-d12-b8"]["reason"] == reason
    assert found["llama-d12-b8-adamw"]["outcome"] == "fit"
    assert f"failed {reason[:12]}" in capsys.readouterr().out
    assert campaign(out, "nano-d12-b8,llama-d12-b8-adamw", children) == 0
    assert by_name(out)["nano-d12-b8"]["outcome"] == "fit"
    assert len(children.started) == 5


def test_out_of_memory_is_a_result_and_not_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, children = tmp_path / "r.jsonl", Children()
    children.next_result = ["oom"]
    campaign(out, "nano-d12-b8", children)
    record = by_name(out)["nano-d12-b8"]
    assert (record["outcome"], record["measurement"]["outcome"]) == ("oom", "oom")
    assert "oom" in capsys.readouterr().out
    campaign(out, "nano-d12-b8", children)
    assert len(children.started) == 2


FULL = """
import resource, sys
from pathlib import Path
from campaign import runs, scratch  # what is imported before memory is bounded
from campaign.children import be_child
pages = int(Path("/proc/self/statm").read_text().split()[0])
bytes_more = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (bytes_more, resource.RLIM_INFINITY))
sys.exit(be_child(sys.argv[1], Path(sys.argv[2])))
"""


def test_a_child_that_really_runs_out_of_memory_says_so() -> None:
    asked = configurations.EAGER[0].asked
    job = Training(
        device="cpu", shape=configurations.shape_of(asked, toy=True),
        # 4 GB of tokens at once: what is asked for bit by bit may end in a dead process
        recipe=configurations.training_recipe(asked, batch=8_000_000, toy=True),
        runtime=Runtime(device="cpu", attention="cpu"),
    )  # fmt: skip
    path = f"import sys; sys.path.insert(0, {str(BENCH)!r})\n"
    ended = run_child(
        job, 120, lambda job, result: [sys.executable, "-c", path + FULL, encode(job), str(result)]
    )
    assert ended.result["outcome"] == "oom", ended.result
    assert ended.result["environment"]["torch"]


def test_the_boundary_of_a_rehearsal_is_where_it_is_predicted() -> None:
    """In this process, so that no trial pays for importing torch."""
    from campaign import runs
    from campaign.predictions import largest_batch
    from snugpt.estimate.training import TrainingStep

    asked, cap = configurations.EAGER[0].asked, 8 * MIB
    shape = configurations.shape_of(asked, toy=True)
    runtime = Runtime(device="cpu", attention="cpu", num_threads=torch.get_num_threads())

    def recipe(batch: int) -> TrainingRecipe:
        return configurations.training_recipe(asked, batch=batch, toy=True)

    def attempt(batch: int) -> str:
        job = Training(
            device="cpu", shape=shape, recipe=recipe(batch), runtime=runtime, cap_bytes=cap
        )
        try:
            runs.training(job)
        except MemoryError:
            return "oom"
        return "fit"

    timeline = TrainingStep(shape, recipe(1), runtime).timeline()
    said = largest_batch(cap, timeline.peak_bytes)
    assert said > 2
    assert bisect(attempt, said) == (said, said + 1)


def test_no_child_begins_when_the_minutes_are_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, children = tmp_path / "r.jsonl", Children()
    assert campaign(out, "nano-d12-b8", children, minutes=0.1) == 1
    assert children.started == []
    assert "1 left" in capsys.readouterr().err


def test_a_child_that_hangs_is_stopped(tmp_path: Path) -> None:
    waits = [sys.executable, "-SEc", "import threading; threading.Event().wait()"]
    ended = run_child(Environment(device="cpu"), 0.3, lambda job, result: waits)
    assert ended.timed_out
    assert ended.result["outcome"] == "failed"


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    records.append(out, {"name": "a", "kind": "training", "outcome": "fit"})
    out.write_bytes(out.read_bytes() + b'{"name": "b", "ki')
    records.append(out, {"name": "c", "kind": "training", "outcome": "fit"})
    assert [r["name"] for r in records.read(out)] == ["a", "c"]


@pytest.mark.parametrize("largest", [1, 7, 40, 41, 44, 63])
def test_the_boundary_is_found_from_any_guess(largest: int) -> None:
    for first in (1, 20, 40, 41, 90):
        tried: list[int] = []

        def attempt(batch: int, tried: list[int] = tried) -> str:
            tried.append(batch)
            return "fit" if batch <= largest else "oom"

        found = bisect(attempt, first)
        assert (found.largest_fit, found.smallest_oom) == (largest, largest + 1)
        assert found.complete
        assert len(tried) == len(set(tried))
        if first == largest:
            assert tried == [largest, largest + 1]


def test_a_boundary_below_batch_1_and_a_trial_that_failed_are_told_apart() -> None:
    assert bisect(lambda batch: "oom", 3).complete
    assert not bisect(lambda batch: None, 3).complete


def test_a_boundary_has_its_prediction_and_every_trial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, children = tmp_path / "r.jsonl", Children()
    children.next_result = ["fit", "oom"]
    assert campaign(out, "boundary-nano-d8", children) == 0
    record = by_name(out)["boundary-nano-d8"]
    expected = record["predicted"]["batch"]["expected"]
    assert record["measured"]["largest_fit"] == expected > 1
    kept = msgspec.convert(record["boundary"], Boundary)  # what the grades are made of
    assert [trial.outcome for trial in kept.trials] == ["fit", "oom"]
    assert (kept.cap_bytes, kept.recipe.device_batch_size) == (8 * MIB, 1)
    assert [t["batch"] for t in record["measured"]["trials"]] == [expected, expected + 1]
    assert f"fits {expected}, not {expected + 1}" in capsys.readouterr().out
    assert {job.cap_bytes for job in children.started if isinstance(job, Training)} == {8 * MIB}


def test_thirty_configurations_of_which_every_third_graded_one_is_held_out() -> None:
    marked = configurations.with_held_out(configurations.EAGER)
    graded = [c for c in marked if c.graded]
    assert len(marked) == len({c.name for c in marked}) == 30
    assert [c.held_out for c in graded] == [i % 3 == 2 for i in range(len(graded))]
    assert not any(c.held_out for c in marked if not c.graded)
    assert 1 <= sum(c.snapshot for c in marked) <= 4


@pytest.mark.parametrize("toy", [False, True])
def test_every_configuration_can_be_asked(toy: bool) -> None:
    for c in configurations.EAGER + configurations.compiled_set():
        if c.kind == "generation":
            shape = configurations.shape_of(c.asked, toy=toy)
            assert configurations.generation_recipe(c.asked, toy=toy).cache_len <= shape.context_len
        elif c.kind in ("training", "boundary"):
            shape = configurations.shape_of(c.asked, toy=toy)
            recipe = configurations.training_recipe(c.asked, batch=1, toy=toy)
            assert recipe.seq_len == shape.context_len


def test_the_set_of_levers_has_every_lever_of_the_trainer_that_the_card_has() -> None:
    found = lever_set.lever_set()
    assert len({c.name for c in found}) == len(found)
    recipes = [configurations.training_recipe(c.asked, batch=8) for c in found]
    assert len(set(recipes)) == len(recipes)
    for lever in PULLED:
        assert {getattr(recipe, lever) for recipe in recipes} >= set(SNUGPT.levers[lever]), lever
    for c in found:
        assert configurations.training_recipe(c.asked, batch=2, toy=True).seq_len == 64


def test_the_parent_predicts_without_torch() -> None:
    code = (
        "import sys, gpu_memory\n"
        "gpu_memory.main(['--dry-run', '--only', 'nano-d12-b8'])\n"
        "assert not sys.modules.keys() & {'torch', 'click', 'rich', 'numpy'}\n"
    )
    where = {"PYTHONPATH": OUR_PATH}
    out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=BENCH, env=where)
    name, requested, allocated, reserved = out.splitlines()[-1].split()
    assert name == "nano-d12-b8"
    assert 0 < float(requested) <= float(allocated) <= float(reserved)


def dry_run(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    assert gpu_memory.main(["--dry-run", *flags]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_dry_run_says_what_its_columns_and_marks_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = "gpt2-d12-b8-adamw,scratch-attention,boundary-nano-d8"
    first, head, gpt2, scratch, boundary, *foot = dry_run(
        capsys, "--gpu", "a100-40gb", "--only", names
    )
    assert first == "predicted for NVIDIA A100-SXM4-40GB, peaks in MiB; nothing was run"
    assert head.split() == ["configuration", "requested", "allocated", "reserved", "held", "out"]
    assert [len(head[: head.index(" held")]), gpt2.split()[-1]] == [gpt2.index(" h"), "h"]
    assert scratch.split()[1:4] == boundary.split()[1:4] == ["-"] * 3
    assert "single kernels" in scratch
    assert "found by trials" in boundary
    assert [line[:3] for line in foot] == ["h: ", "-: "]
    assert len(dry_run(capsys, "--only", "nano-d12-b8")) == 3  # no mark, no word of it


def test_a_dry_run_on_the_processor_says_that_its_rows_are_shrunk(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = dry_run(capsys, "--device", "cpu", "--only", "nano-d12-b8")
    assert lines[0].startswith("predicted for this processor, peaks in MiB")
    assert "shrunk to toy size" in lines[1]
    assert not any("shrunk" in line for line in dry_run(capsys, "--only", "nano-d12-b8"))
    peers = dry_run(capsys, "--device", "cpu", "--set", "nanochat")
    row = next(line for line in peers if "compiled" in line)
    assert row.split()[1:4] == ["-"] * 3  # at toy size nanochat is run and not predicted


def test_every_option_of_the_campaign_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_memory.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option, words in {
        "--set {eager,compiled,levers,nanochat}": "which configurations",
        "--minutes MINUTES": "how long this call may take",
        "--device {cuda,cpu}": "cuda measures; cpu rehearses",
    }.items():
        assert f"{option} {words}" in text


def test_the_history_keeps_pytorchs_entries_our_lines_and_our_phases() -> None:
    from campaign import counters

    frames = [
        {"filename": "/site/torch/nn/modules/module.py", "line": 1, "name": "forward"},
        {"filename": "/src/snugpt/model/gpt.py", "line": 69, "name": "attention"},
        {"filename": "??", "line": 0, "name": "main"},
    ]
    ours = [{"filename": "gpt.py", "line": 69, "name": "attention"}]
    entry = {"action": "alloc", "addr": 7, "size": 512, "stream": 0, "time_us": 5}
    block = {"size": 2048, "state": "inactive"}
    segment = {"address": 7, "total_size": 2048, "segment_pool_id": (0, 0)}
    snapshot = {
        "device_traces": [[entry | {"frames": frames}, entry | {"frames": frames}]],
        "segments": [segment | {"frames": frames, "blocks": [block | {"frames": []}]}],
        "allocator_settings": {"expandable_segments": False},
    }
    found = counters.compact(snapshot, [(5_000, "forward"), (9_000, "backward"), (12_000, "")])
    assert found["device_traces"] == [[entry | {"frames": ours}] * 2]
    first, second = found["device_traces"][0]
    assert first["frames"] is second["frames"]  # pickled once
    assert found["segments"] == [segment | {"frames": ours, "blocks": [block | {"frames": []}]}]
    assert found["allocator_settings"] == snapshot["allocator_settings"]
    ranges = [(a["name"], a["stage"], a["time_us"]) for a in found["external_annotations"]]
    assert ranges == [
        ("forward", "START", 5), ("forward", "END", 8),
        ("backward", "START", 9), ("backward", "END", 11),
    ]  # fmt: skip


def test_the_history_is_read_like_any_snapshot_of_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from campaign import counters
    from snapshot_writer import random_run
    from snugpt.estimate.recorded import timeline_of_snapshot
    from snugpt.estimate.snapshot import read_snapshot

    writer = random_run(3, expandable=False, capacity_bytes=None)
    marks = [(100_000, "forward"), (200_000, "backward"), (10**9, "")]
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", writer.plain)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **_: None)
    packed = tmp_path / "snapshots" / "nano.pickle.gz"
    assert counters.write_history(packed, marks) == packed.stat().st_size
    plain = tmp_path / "nano.pickle"
    plain.write_bytes(gzip.decompress(packed.read_bytes()))
    found = read_snapshot(plain)
    whole = read_snapshot(writer.write(tmp_path / "whole.pickle"))
    assert [(e.action, e.size, e.addr) for e in found.events] == [
        (e.action, e.size, e.addr) for e in whole.events
    ]
    assert found.segments[0].total_size == whole.segments[0].total_size
    timeline = timeline_of_snapshot(found)
    assert timeline.read(1)[0].bytes == timeline_of_snapshot(whole).read(1)[0].bytes
    assert {placed.phase for placed in timeline.placed} == {"recorded", "forward", "backward"}
    assert packed.stat().st_size < plain.stat().st_size


def test_phases_on_a_card_keep_the_highest_of_each_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from campaign import counters

    peaks = iter([0, 7, 9, 5, 3])
    statistics: dict[str, int] = {"num_alloc_retries": 1}

    def fresh() -> None:
        statistics.update(dict.fromkeys(counters.PEAKS.values(), next(peaks)))

    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: dict(statistics))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", fresh)
    fresh()
    phases = counters.CudaPhases()
    for phase in ("forward", "backward", "forward", None):
        phases.mark(phase)
    found = phases.summary()
    assert {name: p["allocated_bytes"] for name, p in found["phases"].items()} == {
        "forward": 7, "backward": 9,
    }  # fmt: skip
    assert (found["reserved_bytes"], found["num_alloc_retries"]) == (9, 1)
    assert [phase for _, phase in phases.marks] == ["forward", "backward", "forward", ""]


def test_the_driver_is_asked_through_its_program_where_its_library_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from campaign import counters

    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 431\n", encoding="ascii")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert counters.driver_use() == (431 * MIB, "nvidia-smi, the whole card")
    program.unlink()
    assert counters.driver_use()[0] is None


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        ({"above_start_bytes": 5, "counted_by": "NVML", "mem_get_info_used_bytes": 9},
         (5, "NVML, above its start")),
        ({"above_start_bytes": None, "counted_by": "nothing", "mem_get_info_used_bytes": 9},
         (9, "torch.cuda.mem_get_info, the whole card")),
    ],
)  # fmt: skip
def test_the_size_of_the_process_says_who_counted_it(
    driver: dict[str, Any], expected: tuple[int, str]
) -> None:
    from campaign.measurements import process_of

    assert process_of(driver) == expected
    assert process_of({})[0] is None


PEER = """
import torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.n_embd)

    def init_weights(self):
        torch.nn.init.normal_(self.table.weight)

    def setup_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1)]

    def forward(self, tokens, targets):
        logits = self.table(tokens) @ self.table.weight.t()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_a_model_of_a_checkout_is_stepped_by_its_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from campaign import runs
    from campaign.jobs import Peer

    package = tmp_path / "nanochat"
    package.mkdir()
    (package / "gpt.py").write_text(PEER, encoding="utf-8")
    (package / "common.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    job = Peer(
        device="cpu", checkout=str(tmp_path), depth=2, device_batch_size=2, seq_len=16,
        vocab_size=64, accumulation=2, compiled=False,
    )  # fmt: skip
    found = runs.peer(job)
    logits_bytes, table_bytes = 2 * 16 * 64 * 4, 64 * 128 * 4
    assert found["phases"].keys() == {"forward", "backward", "optimizer"}
    assert found["allocated_bytes"] > 2 * table_bytes + logits_bytes
    assert found["missing"] == {}
    assert len(found["step_ms"]) == 3


@pytest.mark.parametrize("group", ["attention", "weights", "optimizer"])
def test_every_operation_alone_is_counted(group: str) -> None:
    from campaign import scratch
    from campaign.jobs import Scratch

    found = scratch.scratch(Scratch(device="cpu", group=group, toy=True))
    assert found["missing"] == {}
    assert len(found["cases"]) >= 2
    for case in found["cases"]:
        said = case["predicted_scratch_bytes"]
        assert case["scratch_bytes"] >= 0
        assert said is None or abs(case["scratch_bytes"] - said) <= SCALAR_BYTES, case

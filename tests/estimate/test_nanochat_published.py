"""The nanochat stacks against peaks that others printed: unmodified runs, exact figures.

Nothing is fitted to a row. What a row does not say is how it was started on a single card; the
launcher is named in `published-runs.jsonl`, marked where it was inferred.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nanochat_recipes import recipe_for, shape_at, timeline_for

from snugpt.spec.runtime import Runtime
from snugpt.units import MIB

RECORDS = Path(__file__).parents[2] / "records"
CAPABILITIES = {
    "NVIDIA H100 80GB": (9, 0),
    "NVIDIA H100 NVL 94GB": (9, 0),
    "NVIDIA H20 96GB": (9, 0),
    "NVIDIA A100 80GB PCIe": (8, 0),
    "NVIDIA GeForce RTX 5090": (12, 0),
    "NVIDIA RTX PRO 3000 Blackwell Laptop (11.5 GB)": (12, 0),
}


def lines(name: str) -> dict[str, dict[str, Any]]:
    text = (RECORDS / name).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return {row["id"]: row for row in rows}


RUNS = {name: r for name, r in lines("published-runs.jsonl").items() if r["launcher"]}
ROWS = {
    name: row
    for name, row in lines("published.jsonl").items()
    if name in RUNS and row["confidence"] == "exact" and row["measured"]["allocated_mib"]
}


def predicted_mib(row: dict[str, Any], launcher: str) -> float:
    model, stack = row["model"], RUNS[row["id"]]["stack"]
    shape = shape_at(stack, model["layers"], seq_len=row["seq_len"], vocab_size=model["vocab"])
    shape = msgspec.structs.replace(
        shape, num_heads=model["heads"], num_kv_heads=model["kv_heads"],
        head_dim=model["dim"] // model["heads"],
    )  # fmt: skip
    assert shape.model_dim == model["dim"]
    recipe = recipe_for(
        stack, batch=row["device_batch_size"], seq_len=row["seq_len"], launcher=launcher,
        accumulation=row["grad_accum"], world_size=row["num_gpus"],
        fp8="fp8" in row["compute_dtype"],
    )  # fmt: skip
    assert recipe.total_batch_tokens == row["total_batch_tokens"]
    runtime = Runtime(device="cuda", attention="flash", capability=CAPABILITIES[row["gpu"]])
    alive, _ = timeline_for(shape, recipe, runtime).read(recipe.device_batch_size)
    return alive.bytes / MIB


def ratio(row: dict[str, Any], launcher: str | None = None) -> float:
    predicted = predicted_mib(row, launcher or RUNS[row["id"]]["launcher"])
    return predicted / row["measured"]["allocated_mib"]


def test_the_rows_are_unmodified_runs_with_exact_figures() -> None:
    assert len(ROWS) == 11
    for row in ROWS.values():
        assert (row["kind"], row["confidence"]) == ("train_memory", "exact")
        assert "modified" not in row["program"]
        assert "fork change" not in row["notes"]


def test_parameter_counts_are_those_of_the_rows() -> None:
    from snugpt.estimate.stacks.catalogue import find_stack

    for row in ROWS.values():
        model, stack = row["model"], RUNS[row["id"]]["stack"]
        shape = shape_at(stack, model["layers"], vocab_size=model["vocab"])
        shape = msgspec.structs.replace(
            shape, num_heads=model["heads"], num_kv_heads=model["kv_heads"],
            head_dim=model["dim"] // model["heads"],
        )  # fmt: skip
        assert sum(find_stack(stack).parameter_groups(shape).values()) == row["params"], row["id"]


def test_four_in_five_peaks_are_within_half_a_percent_and_none_past_three() -> None:
    misses = {name: abs(ratio(row) - 1) for name, row in ROWS.items()}
    within = [name for name, miss in misses.items() if miss <= 0.005]
    assert len(within) >= 0.8 * len(misses), misses
    assert max(misses.values()) <= 0.03, misses


@pytest.mark.parametrize("name", [name for name in ROWS if "laptop" not in name])
def test_each_but_the_laptop_is_within_a_thousandth(name: str) -> None:
    assert ratio(ROWS[name]) == pytest.approx(1.0, abs=1e-3)


def test_a_launcher_is_stated_or_marked_as_inferred() -> None:
    for name, row in ROWS.items():
        run, several = RUNS[name], row["num_gpus"] > 1
        assert run["launcher_is"] == ("stated" if several else "inferred")
        assert run["launcher"] == "torchrun" or not several


@pytest.mark.parametrize("name", [name for name in ROWS if RUNS[name]["launcher_is"] == "inferred"])
def test_the_other_launcher_is_off_by_five_percent_at_least(name: str) -> None:
    other = {"python": "torchrun", "torchrun": "python"}[RUNS[name]["launcher"]]
    assert abs(ratio(ROWS[name], other) - 1) > 0.045

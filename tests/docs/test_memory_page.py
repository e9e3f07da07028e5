"""docs/concepts/memory.md is what its program makes today, and its sums are those of the walk."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from snugpt.estimate.memory import memory_estimate, runtime_of, timeline_of
from snugpt.estimate.scratch import ASSUMED
from snugpt.estimate.stacks.catalogue import SNUGPT
from snugpt.planner.answer import plan
from snugpt.planner.picturing import picture_of
from snugpt.planner.pulled import pulled, words
from snugpt.spec.plan import Plan
from snugpt.spec.shape import STYLES
from snugpt.units import gib

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "concepts" / "memory.md"
TEXT = PAGE.read_text(encoding="utf-8")
AGAIN = "make it again: python bench/memory_page.py --write"


def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_page", ROOT / "bench" / "memory_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_its_program_makes() -> None:
    assert program().page(TEXT) == TEXT, AGAIN


def test_the_picture_is_today_s_of_the_command_under_it() -> None:
    command = "--gpu rtx-4090 --depth 24 --device-batch-size 4 --loss plain --checkpoint none"
    assert f"snugpt plan {command} --offload none --exact" in TEXT
    made = picture_of(example())
    assert PAGE.with_suffix(".svg").read_text(encoding="utf-8") == made, AGAIN


def example() -> Plan:
    """The plan of the command on the page."""
    return plan(
        gpu="rtx-4090", depth=24, device_batch_size=4, loss="plain", checkpoint="none",
        offload="none", exact=True,
    )  # fmt: skip


def test_the_categories_and_the_terms_sum_to_what_is_allocated() -> None:
    allocated = gib(example().memory.allocated_bytes)
    for table in ("categories", "terms"):
        assert f"**{allocated}**" in lines_of(table)[-1]
        sizes = [size_of(line) for line in lines_of(table)[2:-1]]
        assert sum(sizes) == pytest.approx(example().memory.allocated_bytes, rel=0.002)


def size_of(row: str) -> float:
    """The first size in a row of a table, in bytes."""
    number, unit = re.findall(r"\| ([\d.]+) (KiB|MiB|GiB) \|", row)[0]
    return float(number) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def test_every_lever_of_the_trainer_that_saves_memory_has_its_row() -> None:
    found = example()
    for each in pulled(found.shape, found.recipe, found.gpu):
        row = [line for line in lines_of("levers") if f"| `{words(each.changes)}` |" in line]
        assert len(row) == (each.bytes_saved > 0), each.changes
        if row:
            left = memory_estimate(found.shape, each.recipe, found.gpu).allocated_bytes
            assert f"| {gib(left)} |" in row[0] or gib(each.bytes_saved) in row[0]
            assert row[0].endswith("| yes |" if each.exact else "| no |")


def test_what_several_cards_keep_and_what_saves_nothing_have_their_rows() -> None:
    found, held = example(), {}
    for row in lines_of("sharding")[2:]:
        num_gpus, sharding = re.findall(r"--num-gpus (\d) --sharding (\w+)`", row)[0]
        recipe = msgspec.structs.replace(
            found.recipe, world_size=int(num_gpus), sharding=sharding, launcher="torchrun",
            grad_accum_steps=found.recipe.grad_accum_steps // int(num_gpus),
        )  # fmt: skip
        memory = memory_estimate(found.shape, recipe, found.gpu)
        assert f" {gib(memory.allocated_bytes)} " in row
        assert (f" to {gib(memory.reserved_bytes.high)}, reserved" in row) == (sharding == "full")
        assert row.endswith(f"| {gib(memory.process_bytes.high)} |")
        held[sharding, num_gpus] = memory.allocated_bytes
    assert {sharding for sharding, _ in held} == {*SNUGPT.levers["sharding"]} - {"none"}
    assert {number for _, number in held} == {"2", "4", "8"}
    assert [row.split("|")[1:3] for row in lines_of("dtypes")[2:]] == [
        [" `--fp8` ", " 0.0 GiB "], [" `--compute-dtype fp16` ", " 0.0 GiB "],
    ]  # fmt: skip


def test_full_sharding_is_excepted_from_what_is_exact_and_traced() -> None:
    said = " ".join(TEXT.split())
    assert "`--sharding full` is the exception: [its figures are a band]" in said
    assert "not a figure to the byte, in the receipt too, and `snugpt trace` does not" in said


def test_every_term_that_our_model_keeps_names_its_line() -> None:
    for line in lines_of("terms")[2:-1]:
        of_others = "cuBLAS workspace" in line or "allocator slack" in line
        assert line.endswith("|  |") == of_others, line


def lines_of(table: str) -> list[str]:
    """The lines of a table: its head, the rule under it, its rows."""
    return [line for line in made(table).splitlines() if line.startswith("|")]


def made(name: str) -> str:
    """The part of the page between two marks."""
    (part,) = re.findall(rf"<!-- made: {name} -->(.*?)<!-- end -->", TEXT, re.DOTALL)
    return part


@pytest.mark.parametrize("style", STYLES)
def test_what_a_layer_keeps_is_what_forward_grows_by(style: str) -> None:
    (total,) = re.findall(r"\*\*one layer\*\* \| \| \*\*([\d,]+)\*\*", made(f"kept {style}"))
    rows = re.findall(r"\| ([\d,]+) \|$", made(f"kept {style}"), re.MULTILINE)
    assert sum(int(row.replace(",", "")) for row in rows) == int(total.replace(",", ""))
    made_plan = plan(gpu="rtx-4090", depth=24, style=style, seq_len=2048, checkpoint="none")
    runtime = runtime_of(made_plan.shape, made_plan.recipe, made_plan.gpu, 1)
    timeline = timeline_of(made_plan.shape, made_plan.recipe, runtime)
    grown = {
        placed.segment.net.per_sequence
        for placed in timeline.placed
        if placed.phase == "forward" and placed.layer in (1, 3, 5)  # those with value embeddings
    }
    assert grown == {2048 * int(total.replace(",", ""))}


def test_every_assumed_operation_is_named_with_its_line() -> None:
    table = made("assumed")
    assert table.count("\n|") == 2 + len(ASSUMED)
    for row in ASSUMED:
        line = next(each for each in table.splitlines() if each.startswith(f"| {row.operation} |"))
        assert f"`{row.source}` | {row.lines.rstrip('.') or 'not opened'}" in line
        assert line.endswith("| assumed |" if row.device == "cuda" else "| observed |")

"""Compiled layers against Inductor's own CUDA plan, read without a card: the committed figures.

`bench/inductor_oracle.py` makes them; see there what is counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_questions import question

from snugpt.estimate.compiled import compiled_layer, why_not_compiled
from snugpt.estimate.operations import Buffer, Net
from snugpt.estimate.stacks.snugpt import layer_part
from snugpt.estimate.timeline import Event
from snugpt.estimate.training import TrainingStep
from snugpt.estimate.walk import Walk, forward, recompute
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, shape_for

GOLDEN = json.loads((Path(__file__).parent / "golden/inductor_blocks.json").read_text())
WITHIN = 0.005
FLASH = Runtime(device="cuda", attention="flash", capability=(9, 0))


class Counted:
    """The bytes of events at one batch size; scratch inside kernels is left out, as in the plan."""

    def __init__(self, batch: int) -> None:
        self.batch, self.bytes, self.highest = batch, 0, 0

    def size(self, buffer: Buffer) -> int:
        if buffer.category == "workspace":
            return 0
        return -(-(buffer.fixed_bytes + self.batch * buffer.sequence_bytes) // 512) * 512

    def run(self, events: list[Event]) -> int:
        """The highest sum while these events happen."""
        self.highest = self.bytes
        for sign, buffer in events:
            self.bytes += sign * self.size(buffer)
            self.highest = max(self.highest, self.bytes)
        return self.highest


def predicted(row: dict[str, Any]) -> dict[str, int]:
    """The figures of one row, by name."""
    shape = shape_for(
        row["style"], GOLDEN["depth"], context_len=row["seq_len"], width=row["width"],
        **row["pinned"],
    )  # fmt: skip
    runtime = Runtime(device="cuda", attention="flash", capability=tuple(row["capability"]))
    net = Net(shape, runtime, row["compute_dtype"], row["seq_len"])
    part = compiled_layer(net, layer_part(net, row["layer"]))
    x = part.entry
    assert x is not None
    count = Counted(row["batch"])
    found = {}
    count.run([Event(1, x)])
    for name, operation in zip(("attention", "mlp"), part.operations, strict=True):
        found[f"{name} forward"] = count.run(
            forward([operation], operation.reads[0], keep=True, hold_entry=True)
        )
        found[f"{name} kept"] = sum(count.size(b) for b in operation.keeps[1:])
    found["kept"] = count.bytes - count.size(part.result)
    count.bytes = found["kept"]
    gradient = net.gradient_of(x)
    count.run([Event(1, gradient)])
    for name, operation in reversed(list(zip(("attention", "mlp"), part.operations, strict=True))):
        events, left = Walk().backward([operation], operation.reads[0], gradient)
        assert left is not None
        found[f"{name} backward"] = count.run(events)
        gradient = left
    weights = [b for op in part.operations for _, b in op.weight_gradients]
    assert count.bytes == count.size(gradient) + sum(count.size(b) for b in weights)
    found["recomputed"] = recomputed(net, row["batch"], part)
    return found


def recomputed(net: Net, batch: int, part) -> int:
    """The crest of the backward pass with checkpoint = blocks."""
    count = Counted(batch)
    gradient = net.gradient_of(part.entry)
    count.run([Event(1, part.entry), Event(1, gradient)])
    again = count.run(recompute(part.operations, part.entry))
    events, _ = Walk().backward(part.operations, part.entry, gradient, hold_entry=True)
    return max(again, count.run(events))


def planned(row: dict[str, Any]) -> dict[str, int]:
    """Inductor's figures of one row, under the same names."""
    found = {"kept": row["kept"], "recomputed": row["recomputed_crest"]}
    for name in ("attention", "mlp"):
        found[f"{name} kept"] = sum(row[name]["kept"].values())
        found[f"{name} forward"] = row[name]["forward_crest"]
        found[f"{name} backward"] = row[name]["backward_crest"]
    return found


def name_of(row: dict[str, Any]) -> str:
    pins = "".join(f" {k} {v}" for k, v in row["pinned"].items())
    return f"{row['style']} {row['width']} {row['batch']}x{row['seq_len']} {row['layer']}{pins}"


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=name_of)
def test_a_compiled_layer_is_predicted_as_inductor_plans_it(row):
    ours, theirs = predicted(row), planned(row)
    assert ours.keys() == theirs.keys()
    ratios = {name: ours[name] / theirs[name] for name in theirs}
    assert {n: r for n, r in ratios.items() if abs(r - 1) > WITHIN} == {}


def test_the_plans_are_those_of_the_pytorch_that_is_pinned():
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    assert f"torch=={GOLDEN['torch'].partition('+')[0]}" in pins


def names(buffers) -> list[str]:
    return [buffer.name for buffer in buffers]


@pytest.mark.parametrize("style", STYLES)
def test_a_compiled_layer_keeps_what_can_t_be_made_again_cheaply(style):
    net = Net(shape_for(style, 4), FLASH, "bf16", 1024)
    part = layer_part(net, 0)
    eager = {buffer for operation in part.operations for buffer in operation.keeps}
    compiled = {b for operation in compiled_layer(net, part).operations for b in operation.keeps}
    assert "norm outputs" not in names(compiled)
    assert "mlp activations" not in names(compiled)
    assert names(compiled).count("residual stream") == 2
    by_attention = next(op for op in part.operations if op.name == "attention").keeps
    assert compiled >= set(by_attention)
    statistics = [buffer for buffer in eager if buffer.name == "norm statistics"]
    assert compiled >= set(statistics)


@pytest.mark.parametrize("style", STYLES)
def test_a_compiled_layer_gives_every_gradient_that_an_eager_one_gives(style):
    net = Net(shape_for(style, 4), FLASH, "bf16", 1024)
    part = layer_part(net, 1)
    given = [pair for operation in part.operations for pair in operation.weight_gradients]
    compiled = compiled_layer(net, part)
    assert [p for op in compiled.operations for p in op.weight_gradients] == given
    assert (compiled.entry, compiled.result) == (part.entry, part.result)


@pytest.mark.parametrize("style", STYLES)
def test_a_compiled_step_of_many_layers_needs_less_than_an_eager_one(style):
    asked = {"style": style, "depth": 12, "seq_len": 1024, "runtime": "flash"}
    eager = TrainingStep(*question(asked)).timeline()
    compiled = TrainingStep(*question(asked | {"compile": "on"})).timeline()
    assert compiled.peak_bytes(16) < eager.peak_bytes(16)
    assert compiled.crests["evaluate"] == eager.crests["evaluate"]
    assert compiled.crests["optimizer"] == eager.crests["optimizer"]


def test_where_compiling_was_never_compared_it_is_refused_by_its_reason():
    shape, recipe, runtime = question({"style": "llama", "depth": 4, "runtime": "flash"}, batch=2)
    assert why_not_compiled(shape, recipe, runtime) is None
    old = Runtime(device="cuda", attention="efficient", capability=(7, 5))
    assert "CUDA 8.0" in str(why_not_compiled(shape, recipe, old))
    assert "CUDA" in str(why_not_compiled(shape, recipe, Runtime(device="cpu", attention="cpu")))
    drops = shape_for("gpt2", 4, dropout=0.1)
    assert "dropout" in str(why_not_compiled(drops, recipe, runtime))


def test_as_many_tokens_as_channels_are_refused_where_norms_have_weights():
    asked = {"depth": 4, "seq_len": 256, "width": 256, "runtime": "flash"}
    for style, refused in (("llama", True), ("gpt2", True), ("nanochat", False)):
        assert bool(why_not_compiled(*question(asked | {"style": style}, batch=1))) is refused
        assert why_not_compiled(*question(asked | {"style": style}, batch=2)) is None

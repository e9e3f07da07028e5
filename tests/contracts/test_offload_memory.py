"""Offload on both sides of the bus: predicted, traced and real, on the device and on the host.

On the CPU both are the same RAM; there the host's part is told apart by what was predicted of it.
"""

from __future__ import annotations

import pytest
from recorder import cpu_runtime, measured_phases, recipe_for
from test_traced_cpu import real_events, traced_events

from snugpt.estimate.host import host_bytes
from snugpt.estimate.memory import timeline_of
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, ModelShape, shape_for

SCALAR_BYTES = 512
FLASH = Runtime(device="cuda", attention="flash", capability=(9, 0))


def small(style: str, **pinned) -> ModelShape:
    sizes = {"context_len": 160, "width": 64, "heads": 4, "kv_heads": 2, "vocab_size": 700}
    return shape_for(style, pinned.pop("depth", 4), **(sizes | pinned))


@pytest.mark.parametrize("checkpoint", ["none", "selective", "blocks"])
@pytest.mark.parametrize("style", STYLES)
def test_what_moves_is_what_the_allocator_sees(style, checkpoint):
    shape = small(style, depth=3)
    steps = ("qkv", "up") if checkpoint == "selective" else ()
    recipe = recipe_for(
        shape, batch=3, checkpoint=checkpoint, accumulation=2, offload="activations", steps=steps
    )
    traced = traced_events(shape, recipe)
    assert len(traced) > 100
    assert traced == real_events(shape, recipe)


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_state_that_moves_is_what_the_allocator_sees(optimizer, clip_norm):
    shape = small("nanochat", depth=2)
    asked = {"optimizer": optimizer, "clip_norm": clip_norm, "offload": "optimizer"}
    recipe = recipe_for(shape, batch=2, **asked)
    traced = traced_events(shape, recipe)
    assert len(traced) > 100
    assert traced == real_events(shape, recipe)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_state_on_the_host_leaves_two_stages_to_the_device(optimizer, state_dtype):
    shape = small("llama", width=256, vocab_size=8192)
    asked = {"optimizer": optimizer, "state_dtype": state_dtype}
    recipe = recipe_for(shape, batch=1, offload="optimizer", **asked)
    timeline = timeline_of(shape, recipe, cpu_runtime(shape))
    on_host = host_bytes(timeline, 1)
    predicted = timeline.read(1)[1]
    measured = measured_phases(shape, recipe)
    off = {phase: predicted[phase] + on_host - measured[phase] for phase in measured}
    assert {phase: n for phase, n in off.items() if abs(n) > SCALAR_BYTES} == {}
    plain = recipe_for(shape, batch=1, **asked)
    state = [
        sum(b.fixed_bytes for b in lines.resident if b.category == "optimizer")
        for lines in (timeline, timeline_of(shape, plain, cpu_runtime(shape)))
    ]
    stage = next(b for b in timeline.resident if b.name == "optimizer stages")
    moved = sum(buffer.fixed_bytes for buffer in timeline.host)
    assert state[0] < state[1]
    assert state[0] - 2 * stage.fixed_bytes == state[1] - moved


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
@pytest.mark.parametrize("style", STYLES)
def test_both_memories_together_are_what_the_process_takes(style, checkpoint):
    shape = small(style, depth=5, width=128)
    recipe = recipe_for(shape, batch=4, checkpoint=checkpoint, offload="activations")
    timeline = timeline_of(shape, recipe, cpu_runtime(shape))
    on_host = host_bytes(timeline, 4)
    predicted = timeline.read(4)[1]
    measured = measured_phases(shape, recipe)
    off = {phase: predicted[phase] + on_host - measured[phase] for phase in measured}
    assert {phase: n for phase, n in off.items() if abs(n) > SCALAR_BYTES} == {}


@pytest.mark.parametrize("style", STYLES)
def test_deeper_models_keep_no_more_on_the_device_but_all_the_more_on_the_host(style):
    """Two layers' tensors at a time: another layer costs its weights, gradients and state only."""

    def activations(depth: int, offload: str) -> tuple[int, int]:
        shape = small(style, depth=depth, vocab_size=256)
        recipe = recipe_for(shape, batch=8, dtype="bf16", offload=offload)
        timeline = timeline_of(shape, recipe, FLASH)
        alive = timeline.read(8)[0].buffers
        here = sum(
            n * timeline.bytes_of(b, 8) for b, n in alive.items() if b.category == "activations"
        )
        return here, sum(b.fixed_bytes + 8 * b.sequence_bytes for b in timeline.host)

    shallow, deep = activations(4, "activations"), activations(12, "activations")
    small_ones = activations(12, "none")[0] - activations(4, "none")[0]
    assert deep[0] - shallow[0] < 0.07 * small_ones
    assert deep[1] > 3 * shallow[1]

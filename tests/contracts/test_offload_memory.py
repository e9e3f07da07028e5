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


@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
@pytest.mark.parametrize("style", STYLES)
def test_what_moves_is_what_the_allocator_sees(style, checkpoint):
    shape = small(style, depth=3)
    recipe = recipe_for(
        shape, batch=3, checkpoint=checkpoint, accumulation=2, offload="activations"
    )
    traced = traced_events(shape, recipe)
    assert len(traced) > 100
    assert traced == real_events(shape, recipe)


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

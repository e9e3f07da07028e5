"""What waiting for the host costs: nothing where computing hides it, else the rest of the copy."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import snugpt
from snugpt.estimate.host import GPU_HOST_BYTES, host_bytes
from snugpt.estimate.levers import why_not
from snugpt.estimate.memory import runtime_of, timeline_of
from snugpt.estimate.speed import step_time_s
from snugpt.estimate.transfers import (
    LINK_SHARE,
    UNKNOWN_LINK_BYTES_PER_S,
    bytes_one_way,
    waiting_s,
)
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import shape_for

GPU = find_gpu("rtx-4090")
FLASH = Runtime(device="cuda", attention="flash", capability=(8, 9))


@pytest.fixture(scope="module")
def recipe():
    return snugpt.plan(gpu="rtx-4090", depth=12, seq_len=2048, total_batch_tokens=2**19).recipe


def moved(recipe, **changes):
    return shape_for("nanochat", 12), replace(recipe, checkpoint="none", **changes), GPU


def test_activations_cross_the_link_once_each_way_for_every_token(recipe):
    shape, asked, gpu = moved(recipe, offload="activations")
    per_sequence, per_step = bytes_one_way(shape, asked, gpu)
    assert per_step == 0
    copy_s = 2**19 / 2048 * per_sequence / (gpu.host_link_bytes_per_s * LINK_SHARE)
    assert waiting_s(shape, asked, gpu, 0.0, 0.0) == pytest.approx(2 * copy_s)
    # forward is a third: as long as the copy when all of the step takes three times as long
    assert waiting_s(shape, asked, gpu, 3 * copy_s, 0.0) == pytest.approx(0.0)
    assert waiting_s(shape, asked, gpu, 1.5 * copy_s, 0.0) == pytest.approx(0.5 * copy_s)


def test_state_crosses_the_link_once_each_way_for_every_step(recipe):
    shape, asked, gpu = moved(recipe, offload="optimizer", optimizer="adamw")
    per_sequence, per_step = bytes_one_way(shape, asked, gpu)
    assert per_sequence == 0
    total = sum(snugpt.plan(gpu="rtx-4090", depth=12).parameters.groups.values())
    assert per_step == pytest.approx(8 * total, rel=0.001)  # gates and scalars stay
    copy_s = per_step / (gpu.host_link_bytes_per_s * LINK_SHARE)
    assert waiting_s(shape, asked, gpu, 100.0, 0.25 * copy_s) == pytest.approx(0.75 * copy_s)
    assert waiting_s(shape, asked, gpu, 100.0, 2 * copy_s) == 0.0


def test_updates_in_backward_hide_the_copies_of_state_behind_it(recipe):
    shape, asked, gpu = moved(recipe, offload="optimizer")
    batch = asked.total_batch_tokens // asked.seq_len
    free = replace(asked.schedule, clip_norm=0.0)
    alone = replace(asked, grad_accum_steps=1, device_batch_size=batch, schedule=free)
    assert alone.steps_in_backward
    assert waiting_s(shape, alone, gpu, 100.0, 0.0) == 0.0
    assert waiting_s(shape, asked, gpu, 100.0, 0.0) > 0.0


def test_an_unknown_link_is_taken_for_a_slow_one(recipe):
    shape, asked, gpu = moved(recipe, offload="optimizer")
    unknown = replace(gpu, host_link_bytes_per_s=None)
    ratio = gpu.host_link_bytes_per_s / UNKNOWN_LINK_BYTES_PER_S
    found = waiting_s(shape, asked, unknown, 0.0, 0.0)
    assert found == pytest.approx(ratio * waiting_s(shape, asked, gpu, 0.0, 0.0))


def test_a_step_that_moves_something_takes_longer_never_shorter(recipe):
    shape, none, gpu = moved(recipe)
    times = [
        step_time_s(shape, replace(none, offload=value), gpu, 60e12)
        for value in ("none", "optimizer", "activations")
    ]
    assert times[0] <= times[1]
    assert times[0] <= times[2]


# Rows of twice the tokens, on two devices.
SHARDED = {
    "sharding": "optimizer", "world_size": 2, "launcher": "torchrun", "total_batch_tokens": 2**20,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "runtime", "depth", "because"),
    [
        ({"offload": "optimizer"}, Runtime(device="cpu", attention="cpu"), 4, "CPU"),
        ({"offload": "activations"}, Runtime(device="cpu", attention="cpu"), 4, "CPU"),
        ({"offload": "activations"}, FLASH, 1, "last layer"),
        ({"offload": "activations", "compile": "on"}, FLASH, 4, "compiled"),
        ({"offload": "optimizer", **SHARDED}, FLASH, 4, "sharding"),
    ],
)  # fmt: skip
def test_offload_that_would_change_nothing_or_was_not_derived_is_refused(
    recipe, changes, runtime, depth, because
):
    shape = shape_for("nanochat", depth)
    found = why_not(shape, replace(recipe, checkpoint="none", **changes), runtime)
    assert found is not None
    assert found.lever == "offload"
    assert because in found.because


def test_a_model_too_small_to_move_is_refused_and_any_other_is_not(recipe):
    tiny = shape_for("llama", 2, width=16, heads=1, kv_heads=1, vocab_size=100, mlp=64)
    asked = replace(recipe, offload="optimizer")
    assert "so small" in why_not(tiny, asked, FLASH).because
    for value in ("optimizer", "activations"):
        assert why_not(shape_for("gpt2", 2), replace(asked, offload=value), FLASH) is None


@pytest.mark.parametrize("offload", ["none", "optimizer", "activations"])
def test_a_plan_says_the_host_memory_it_pins(offload):
    plan = snugpt.plan(gpu="rtx-4090", depth=12, offload=offload)
    runtime = runtime_of(plan.shape, plan.recipe, GPU, 1)
    timeline = timeline_of(plan.shape, plan.recipe, runtime)
    pinned = host_bytes(timeline, plan.recipe.device_batch_size)
    assert plan.host.ram_bytes == GPU_HOST_BYTES + pinned
    assert (pinned > 0) == (offload != "none")


def test_a_checkpoint_is_as_large_wherever_its_state_lay():
    sizes = {
        snugpt.plan(gpu="rtx-4090", depth=12, offload=value).host.checkpoint_bytes
        for value in ("none", "optimizer", "activations")
    }
    assert len(sizes) == 1

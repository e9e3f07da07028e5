"""Anybody's model: peaks against MemTracker and the real CPU allocator, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from small_models import (
    H100,
    T4,
    C,
    Perceptron,
    T,
    Tiny,
    V,
    mem_tracker_peak,
    on_meta,
    on_the_cpu,
    tokens,
    trace,
)
from torch import nn

import snugpt
from snugpt.cli.model_screen import screen
from snugpt.errors import BadQuestionError
from snugpt.estimate import scratch
from snugpt.planner.machine import machine_for
from snugpt.run.cpu_allocations import CpuAllocations

VARIANTS = [{}, {"tied": True}, {"rms": True}, {"dropout": 0.1}, {"recompute": True}]
HOST_BYTES_PER_PARAMETER = 4  # AdamW's step counters are single values in host memory
RANDOM_STATE_BYTES = 5056  # and so is the generator's state that a checkpoint keeps


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize(("gpu", "runtime"), [("h100", H100), ("t4", T4)])
def test_the_peak_is_that_of_pytorchs_mem_tracker(options, gpu, runtime) -> None:
    dtype = torch.bfloat16 if gpu == "h100" else None
    theirs = mem_tracker_peak(lambda: Tiny(**options), on_meta(tokens), runtime, dtype)
    traced = trace(lambda: Tiny(**options), tokens(), gpu=gpu)
    unrounded = replace(traced.timeline, block_bytes=1).read(1, workspace=False)[0].bytes
    assert unrounded == theirs


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_each_phase_is_that_of_a_step_that_really_runs(options) -> None:
    real = on_the_cpu(lambda: Tiny(**options), tokens)
    traced = trace(lambda: Tiny(**options), tokens(), gpu="cpu")
    _, phases = traced.timeline.read(1)
    host = HOST_BYTES_PER_PARAMETER * len(list(Tiny(**options).parameters())) + 16
    host += 2 * RANDOM_STATE_BYTES if options.get("recompute") else 0
    assert phases.keys() == real.keys()
    for phase, measured in real.items():
        assert 0 <= measured - phases[phase] <= host, phase


def test_the_engine_adds_gradients_in_place_which_mem_tracker_hides() -> None:
    """A tensor that is used often: every further gradient would be a copy under a mode."""

    class Often(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4))

        def forward(self, x):
            h = x * self.weight
            return sum((h * k).sum() for k in range(4))

    def build():
        return Often()

    def batch():
        return (torch.zeros(1 << 16, 4),)

    theirs = mem_tracker_peak(build, on_meta(batch), H100)
    traced = trace(build, batch(), dtype=None)
    real = on_the_cpu(build, batch)
    ours = trace(build, batch(), gpu="cpu").timeline.read(1)[1]
    assert traced.requested_bytes < theirs
    assert 0 <= real["backward"] - ours["backward"] < 100


def test_the_users_module_is_not_touched() -> None:
    model = Tiny(tied=True).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    traced = trace(model, tokens(), gpu="rtx-4090")
    assert not model.training
    assert all(each.grad is None and each.device.type == "cpu" for each in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert traced.allocated_bytes == trace(lambda: Tiny(tied=True), tokens(),
                                                  gpu="rtx-4090").allocated_bytes  # fmt: skip


def test_a_model_is_copied_without_its_data() -> None:
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))  # 8 MiB
    with CpuAllocations(keep_events=False) as allocations:
        traced = trace(
            model, torch.empty(1, 512), gpu="t4", loss=lambda output, batch: output.sum()
        )
    assert allocations.peak_bytes < 2**18
    assert traced.requested_bytes > 3 * 2**23


def test_a_model_far_larger_than_this_machine_is_traced() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(16384, 16384, bias=False) for _ in range(80)))
    traced = trace(model, torch.empty(1, 16384), train=False, gpu="h100", dtype=None)
    assert traced.requested_bytes > 80 * 16384**2 * 4
    assert not traced.fits
    assert traced.largest_batch() == 0


def test_what_attention_takes_inside_itself_is_counted() -> None:
    timeline = trace(Tiny(), tokens(), gpu="rtx-4090").timeline
    inside = [
        event.buffer.fixed_bytes
        for _, _, event in timeline.events()
        if event.sign > 0 and "flash_attention_backward" in event.buffer.name
        and event.buffer.category == "workspace"
    ]  # fmt: skip
    heads, size = 4, C // 4
    per_sequence = scratch.flash_backward(T, heads, heads, size, 2)
    assert inside == 2 * [4 * each for each in per_sequence]


def test_the_largest_batch_is_a_division_that_other_traces_confirm() -> None:
    traced = trace(lambda: Tiny(), tokens(), gpu="rtx-3060")
    largest = traced.largest_batch()
    assert largest is not None
    assert largest > 1000
    assert sorted(traced.tracer._recorded) == [1, 2, 3, 4, 5]
    again = trace(lambda: Tiny(), tokens(), gpu="rtx-3060", batch_size=largest)
    above = trace(lambda: Tiny(), tokens(), gpu="rtx-3060", batch_size=largest + 1)
    assert again.fits
    assert not above.fits
    smaller = traced.largest_batch("t4")
    assert smaller is not None
    assert smaller == trace(lambda: Tiny(), tokens(), gpu="t4").largest_batch()


class Similarity(nn.Module):
    """Every sequence against every other: its memory is no line over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        y = self.layer(x)
        return (y @ y.t()).logsumexp(0).sum()


def test_memory_that_is_no_line_over_the_batch_is_searched_by_traces() -> None:
    traced = trace(Similarity(), torch.zeros(4, 8), gpu="t4")
    largest = traced.largest_batch()
    assert largest is not None
    assert traced.tracer.record(largest) is not None
    assert trace(Similarity(), torch.zeros(4, 8), gpu="t4", batch_size=largest).fits
    assert not trace(Similarity(), torch.zeros(4, 8), gpu="t4", batch_size=largest + 1).fits


def test_phases_tensors_and_counters_are_said() -> None:
    traced = trace(Tiny(), tokens(), gpu="h100")
    assert list(traced.phases) == ["forward", "backward", "clip", "optimizer"]
    assert traced.attention == {"cudnn": 2}
    assert traced.requested_bytes <= traced.allocated_bytes <= traced.reserved_bytes.expected
    assert traced.process_bytes.low > traced.allocated_bytes
    names = {each.name: each for each in traced.tensors}
    moments = names["AdamW exp_avg"]
    assert (moments.category, moments.count) == ("optimizer", len(list(Tiny().parameters())))
    (found,) = [each for each in traced.tensors if each.name.startswith("blocks.*.up: addmm")]
    assert found.count == 2
    assert found.bytes == 2 * 4 * T * 4 * C * 2
    assert "small_models.py:" in found.name
    assert json.dumps(traced.to_dict())
    assert repr(traced).startswith("<Trace of batch 4 on h100-80gb: ")
    everything = {event.buffer.name for _, _, event in traced.timeline.events()}
    assert {"blocks.1.down: backward, mm", "blocks.0.norms.1: backward, native_layer_norm_backward",
            "model: backward, nll_loss_backward"} <= everything  # fmt: skip
    assert sum(each.bytes for each in traced.tensors) >= traced.requested_bytes


def test_holding_the_outputs_and_accumulating_cost_what_they_cost() -> None:
    plain = trace(lambda: Tiny(), tokens(), gpu="h100")
    held = trace(lambda: Tiny(), tokens(), gpu="h100", keep_outputs=True)
    assert held.requested_bytes - plain.requested_bytes == 4 * T * V * 2 + (-4 * T * V * 2) % 512
    accumulated = trace(lambda: Tiny(), tokens(), gpu="h100", grad_accum_steps=2)
    gradients = sum(each.numel() * 4 for each in Tiny().parameters())
    assert accumulated.requested_bytes - plain.requested_bytes == pytest.approx(gradients, rel=0.05)


def test_optimizers_and_no_optimizer() -> None:
    adamw = trace(Tiny(), tokens())
    foreach = trace(Tiny(), tokens(), optimizer=lambda p: torch.optim.AdamW(p, foreach=True))
    sgd = trace(Tiny(), tokens(), optimizer=lambda p: torch.optim.SGD(p, 0.1))
    none = trace(Tiny(), tokens(), optimizer=None)
    assert "optimizer" not in none.phases
    assert foreach.phases["optimizer"] > adamw.phases["optimizer"] > sgd.phases["optimizer"]
    assert adamw.phases["forward"] > sgd.phases["forward"] == none.phases["forward"]


def test_losses_are_found_where_models_put_them() -> None:
    class Output(dict):
        pass

    class Model(nn.Module):
        def __init__(self, wrap) -> None:
            super().__init__()
            self.layer, self.wrap = nn.Linear(4, 4), wrap

        def forward(self, x):
            return self.wrap(self.layer(x))

    x = torch.zeros(2, 4)
    for wrap in (
        lambda y: y.sum(), lambda y: (y, y.sum()), lambda y: (y.sum(), y),
        lambda y: Output(loss=y.sum(), logits=y), lambda y: type("O", (), {"loss": y.sum()})(),
    ):  # fmt: skip
        assert trace(Model(wrap), x).notes == ()
    given = trace(Model(lambda y: [y, y]), x, loss=lambda output, batch: output[0].sum())
    assert given.notes == ()
    for wrap, said in (
        (lambda y: y, r"a tensor 2 x 4 \(bfloat16\), in which there is no scalar loss"),
        (lambda y: (y, None), r"tuple of a tensor 2 x 4 \(bfloat16\), None"),
        (lambda y: [y, y], "list of a tensor"),
        (lambda y: Output(logits=y), "Output with logits"),
        (lambda y: y.sum().detach(), "of one value without a gradient"),
        (lambda y: None, "returned None"),
    ):
        with pytest.raises(BadQuestionError, match=said) as caught:
            trace(Model(wrap), x, gpu="h100")
        assert "loss=" in caught.value.hint
    with pytest.raises(BadQuestionError, match="loss = 'a tensor 2 x 4"):
        trace(Model(lambda y: y), x, loss=lambda output, batch: output, gpu="h100")


def test_the_parameters_that_got_nothing_are_named_where_a_loss_is_missing() -> None:
    class Model(nn.Linear):
        def forward(self, x, tgt=None, *, weights=None, **more):
            return super().forward(x)

    for batch in ({"x": torch.zeros(2, 4)}, (torch.zeros(2, 4),), torch.zeros(2, 4)):
        with pytest.raises(BadQuestionError, match="of forward's parameters tgt, weights got"):
            trace(Model(4, 4), batch, gpu="h100")
    assert trace(Model(4, 4), torch.zeros(2, 4), train=False, gpu="h100").fits


def test_without_a_card_this_machine_is_meant() -> None:
    here = machine_for(None)
    traced = snugpt.trace(Tiny(), tokens())
    assert (traced.gpu.id, traced.tracer.machine.gpu.name) == (here.gpu.id, here.gpu.name)


def test_a_forward_pass_needs_no_loss() -> None:
    traced = trace(Perceptron(), torch.zeros(2, 96), train=False, gpu="h100")
    assert list(traced.phases) == ["forward"]


def test_the_screen_holds_in_80_columns() -> None:
    for gpu, train in (("h100", True), ("t4", False)):
        lines = list(screen(trace(Tiny(), tokens(), gpu=gpu, train=train)))
        assert max(map(len, lines)) < 80
        text = "\n".join(lines)
        assert "FITS" in text
        assert "the largest that fits is" in text
        assert "largest tensors at the peak" in text

"""Anybody's model: peaks against MemTracker and the real CPU allocator, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    CHILD,
    H100,
    T4,
    C,
    Perceptron,
    T,
    Tiny,
    V,
    mem_tracker_peak,
    on_the_cpu,
    tokens,
)
from torch import nn

import snugpt
from snugpt.cli.model_screen import screen
from snugpt.errors import BadQuestionError, FailedError
from snugpt.estimate import scratch
from snugpt.planner.machine import machine_for
from snugpt.run.cpu_allocations import CpuAllocations
from snugpt.tracing.named_model import trace_named

VARIANTS = [{}, {"tied": True}, {"rms": True}, {"dropout": 0.1}, {"recompute": True}]
HOST_BYTES_PER_PARAMETER = 4  # AdamW's step counters are single values in host memory
RANDOM_STATE_BYTES = 5056  # and so is the generator's state that a checkpoint keeps


def trace(model, batch, *, gpu="h100", **options):
    return snugpt.trace(model, batch, gpu=gpu, **options)


def on_meta(make):
    def batch():
        with torch.device("meta"):
            return tuple(torch.empty_like(each, device="meta") for each in make())

    return batch


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


class Does(nn.Module):
    """A model that does one thing to its input."""

    def __init__(self, what) -> None:
        super().__init__()
        self.layer, self.what = nn.Linear(4, 4), what

    def forward(self, x):
        return self.what(self.layer(x)).sum()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda y: y * y.mean().item(), "waits for data"),
        (lambda y: y if y.sum() > 0 else -y, "waits for data"),
        (lambda y: y + y.tolist()[0][0], "waits for data"),
        (lambda y: y + float(y.sum()), "waits for data"),
        (lambda y: torch.from_numpy(y.detach().numpy()) + y, "waits for data"),
        (lambda y: y.cpu().sum(), "waits for data"),
        (lambda y: y[y > 0].sum(), "waits for data"),
        (lambda y: y.nonzero().sum() + y.sum(), "waits for data"),
        (lambda y: y.masked_select(y > 0).sum(), "waits for data"),
        (lambda y: y.sum() + y.unique().sum(), "waits for data"),
        (lambda y: (y.data_ptr(), y.sum())[1], "waits for data"),
        (lambda y: y + torch.ones(4), "mixes a CPU tensor"),
        (lambda y: F.embedding(torch.arange(3), y).sum(), "mixes a CPU tensor"),
        (lambda y: torch.where(y > 0, torch.zeros(2, 4), y), "mixes a CPU tensor"),
        (lambda y: torch.cuda.synchronize() or y, "asks for CUDA itself"),
        (lambda y: y.view(5, 5), "raised RuntimeError: shape"),
        (lambda y: 1 / 0, "raised ZeroDivisionError: division by zero"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_trace_cannot_follow_is_refused_with_its_line(what, said: str) -> None:
    with pytest.raises(FailedError) as caught:
        trace(Does(what), torch.zeros(2, 4))
    line = what.__code__.co_firstlineno
    assert said in caught.value.message
    assert f"test_any_model.py:{line}: `" in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


class Contexts(nn.Module):
    """A model that keeps two contexts, one of them off."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.on = torch.autocast("cuda", torch.bfloat16)
        self.off = torch.autocast("cuda", enabled=False)

    def forward(self, x):
        with self.on:
            assert self.layer(x).dtype == torch.bfloat16
            with self.off:
                return self.layer(x).sum()


def test_contexts_that_a_model_keeps_are_obeyed() -> None:
    traced = trace(Contexts, torch.zeros(2, 4), dtype=None)
    assert traced.notes == ()
    with pytest.warns(UserWarning, match="Disabling autocast"):
        made_before = torch.autocast("cuda", torch.bfloat16)

    def decorated(y):
        with made_before:
            assert (y @ y.t()).dtype == torch.bfloat16
        return y.sum()

    traced = trace(Does(decorated), torch.zeros(2, 4), dtype=None)
    assert traced.notes == ("an autocast made before the trace was taken as on",)


def test_hugging_faces_question_about_masks_is_answered_and_said(tmp_path: Path) -> None:
    file = tmp_path / "transformers" / "masking_utils.py"
    file.parent.mkdir()
    file.write_text("def is_needed(mask):\n    return not mask.all()\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("masking_utils_of_a_test", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def asks(y):
        assert not module.is_needed(y > 0)
        return y.sum()

    traced = trace(Does(asks), torch.zeros(2, 4))
    assert traced.notes == ("assumed: no padding and no packed sequences in the batch",)


def test_recurrent_layers_are_refused_on_a_gpu_and_traced_on_the_cpu() -> None:
    def loss(output, batch):
        return output[0].sum()

    layer, x = nn.GRU(4, 4), torch.zeros(3, 2, 4)
    with pytest.raises(FailedError, match="gru runs inside cuDNN"):
        trace(layer, x, loss=loss)
    assert trace(layer, x, loss=loss, gpu="cpu").fits


def test_code_for_cuda_is_understood() -> None:
    def moves(y):
        assert y.is_cuda
        other = torch.ones(4, device="cuda") + torch.zeros(4).cuda() + torch.arange(4).to("cuda:0")
        return y.cuda().to(torch.device("cuda")) + other[torch.arange(4)]

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y * 2

        @staticmethod
        def backward(ctx, grad):
            assert grad.is_cuda
            return grad.cuda() * 2

    def by_number(y):
        for device in (
            torch.device("cuda", 0), torch.device("cuda", index=1), torch.device("cuda:0"),
            torch.device(type="cuda", index=0), torch.device(type="cuda"), torch.device(0),
        ):  # fmt: skip
            y = y.to(device) + torch.zeros(4, device=device) + nn.Linear(4, 4).to(device)(y)
        assert torch.device("cpu", 0).type == "cpu"
        return y.to(0) + torch.ones(4, device=0) + nn.Linear(4, 4).to(0)(y)

    def compiles(y):
        assert torch.compile(moves) is moves
        return Twice.apply(moves(y))

    assert trace(Does(compiles), torch.zeros(2, 4)).batch_size == 2
    assert trace(Does(by_number), torch.zeros(2, 4)).batch_size == 2


def test_modes_and_patches_are_gone_after_a_trace_that_failed() -> None:
    before = torch.is_autocast_enabled, torch.clear_autocast_cache, torch.autocast.__init__
    with pytest.raises(FailedError):
        trace(Does(lambda y: y.item()), torch.zeros(2, 4))
    assert before == (torch.is_autocast_enabled, torch.clear_autocast_cache,
                      torch.autocast.__init__)  # fmt: skip
    assert not torch.is_autocast_enabled("cuda")
    query = torch.empty(1, 1, 4, 8, device="meta", requires_grad=True)
    scores = F.scaled_dot_product_attention(query, query, query).grad_fn
    assert "Flash" not in str(scores)
    assert torch.ones(2).is_cuda is False


def test_nothing_that_is_asked_of_a_model_aborts_the_process() -> None:
    code = """
import torch, snugpt
from torch import nn
import torch.nn.functional as F
class Does(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.layer, self.what = nn.Linear(8, 8), what
    def forward(self, x):
        return self.what(self.layer(x)).sum()
class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 2
    @staticmethod
    def backward(ctx, grad): return grad.cuda() * 2
for number, what in enumerate((
    lambda y: y.cuda(), lambda y: y.to("cuda").half(), lambda y: torch.zeros(8, device="cuda") + y,
    lambda y: nn.Linear(8, 8).cuda()(y), lambda y: nn.Linear(8, 8, device="cuda:1")(y),
    lambda y: Twice.apply(y), lambda y: torch.cuda.current_stream() and y,
    lambda y: y + torch.cuda.FloatTensor(8), lambda y: y.untyped_storage()[0] + y,
    lambda y: y.share_memory_(), lambda y: torch.compile(lambda z: z * 2)(y),
    lambda y: y.__dlpack__() and y,
    lambda y: F.scaled_dot_product_attention(y[None, None].cuda(), y[None, None], y[None, None]),
    lambda y: nn.MultiheadAttention(8, 2, device="cuda")(y, y, y)[0],
    lambda y: nn.LSTM(8, 8, device="cuda")(y)[0], lambda y: y.pin_memory(),
    lambda y: y.to_sparse() * 1,
    lambda y: torch.fft.fft(y).abs(), lambda y: torch.linalg.svd(y)[1], lambda y: y.to("cpu"),
)):
    try:
        snugpt.trace(Does(what), torch.zeros(2, 8), gpu="h100")
        said = "traced"
    except snugpt.SnugError as error:
        said = error.message
    print(number, said)
print("alive")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120,
        env=CHILD, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-600:]
    assert done.stdout.splitlines()[-1] == "alive"


def test_questions_that_cannot_be_are_refused() -> None:
    x = torch.zeros(2, 96)
    for options, said in (
        ({"gpu": "rtx-4091"}, "did you mean 'rtx-4090'"),
        ({"gpu": "t4", "dtype": "bf16"}, "has no bf16"),
        ({"gpu": "cpu", "dtype": "bf16"}, "None on the CPU"),
        ({"dtype": "fp8"}, "auto, bf16, fp16 or None"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"grad_accum_steps": 0}, "grad_accum_steps = 0"),
        ({"optimizer": "adam"}, "optimizer = 'adam'"),
        ({"optimizer": lambda weights: 3}, "optimizer = 'int'"),
    ):
        with pytest.raises(BadQuestionError, match=said):
            trace(Perceptron(), x, **options)
    with pytest.raises(BadQuestionError, match="batch"):
        trace(Perceptron(), {"x": 3})
    with pytest.raises(BadQuestionError, match="model"):
        trace(3, x)
    with pytest.raises(BadQuestionError, match="model = 'int'"):
        trace(lambda: 3, x)
    with pytest.raises(BadQuestionError, match="model = 'tuple of Perceptron, int'"):
        trace(lambda: (Perceptron(), 1), x)
    with pytest.raises(BadQuestionError, match="requires a gradient"):
        trace(Perceptron().requires_grad_(False), x)


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory; its name is new in every test."""
    name = f"module_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)\n"
        "    def forward(self, idx, targets=None):\n"
        "        logits = self.head(self.table(idx))\n"
        "        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())\n"
        "        return logits, loss\n"
        "def build(): return Model()\n"
        "class Mean(nn.Linear):\n"
        "    def forward(self, x): return super().forward(x).mean()\n"
        "def with_batch(): return Mean(8, 50), torch.zeros(6, 8)\n"
        "def sized(batch_size=1): return Mean(8, 50), torch.zeros(batch_size, 8)\n"
        "def raises():\n"
        "    raise ValueError('no such\\nlayer')\n"
        "number = 3\n"
        "model = Model()\n",
        encoding="utf-8",
    )
    (tmp_path / f"{name}_broken.py").write_text("import torch\n1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_a_model_is_found_by_its_name(named: str) -> None:
    assert trace_named(f"{named}:build", seq_len=16).batch_size == 8
    assert trace_named(f"{named}:Model", batch_size=3, seq_len=16, gpu="t4").batch_size == 3
    assert trace_named(f"{named}:with_batch").batch_size == 6
    sized = trace_named(f"{named}:sized", batch_size=5)
    assert sized.batch_size == 5
    assert sized.largest_batch()


def test_a_name_that_leads_nowhere_says_what_may_have_been_meant(named: str) -> None:
    for spec, said in (
        (f"{named}:biuld", "did you mean 'build'"),
        (f"{named[:-1]}:build", f"did you mean '{named}'"),
        ("build", "package.module:callable"),
        ("a b:c", "package.module:callable"),
        (f"{named}:number", "a function or class that builds a model"),
        (f"{named}:model", "a function or class that builds a model"),
        ("torch.nnn:Linear", "unknown module in torch 'nnn'"),
    ):
        with pytest.raises(BadQuestionError, match=said):
            trace_named(spec)
    with pytest.raises(FailedError, match=rf"{named}\.py:17: `raise ValueError.*no such layer"):
        trace_named(f"{named}:raises")
    with pytest.raises(FailedError, match=rf"{named}_broken\.py:2: `1 / 0` raised ZeroDivision"):
        trace_named(f"{named}_broken:build")


def test_the_screen_holds_in_80_columns() -> None:
    for gpu, train in (("h100", True), ("t4", False)):
        lines = list(screen(trace(Tiny(), tokens(), gpu=gpu, train=train)))
        assert max(map(len, lines)) < 80
        text = "\n".join(lines)
        assert "FITS" in text
        assert "the largest that fits is" in text
        assert "largest tensors at the peak" in text

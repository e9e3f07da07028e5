"""What a trace of anybody's code refuses, with its line, and what of CUDA it understands."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    CHILD,
    Perceptron,
    trace,
)
from torch import nn

from snugpt.errors import BadQuestionError, FailedError


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
    assert f"test_refusals.py:{line}: `" in caught.value.message
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

"""What CUDA would do with an operation: dtypes under autocast, attention kernels, fused forms."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import CHILD, H100, T4
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snugpt.errors import FailedError
from snugpt.spec.runtime import Runtime
from snugpt.tracing import autocast
from snugpt.tracing.kernels import kernels_of
from snugpt.tracing.refusals import users_code
from snugpt.tracing.ways import ways_of

CPU = Runtime(device="cpu", attention="cpu")
# One call of each policy, on x (16, 64) bf16, w (64, 64) fp32 and t (16,) int64.
CALLS = [
    "F.linear(x, w)", "x @ w", "torch.einsum('ij,jk->ik', x, w)", "F.cross_entropy(x, t)",
    "F.cross_entropy(x.float(), t)", "F.softmax(x, -1)", "F.log_softmax(x, -1)",
    "F.layer_norm(x, (64,))", "x**2", "x.sum(-1)", "x.sum()", "x.norm()", "x.norm(dim=1)",
    "torch.linalg.vector_norm(x)", "F.mse_loss(x, x)", "x.exp()", "torch.rsqrt(x)", "x.cumsum(0)",
    "F.softplus(x)", "F.gelu(x)", "F.silu(x)", "torch.cat([x, w])", "torch.stack([x, x])",
    "x * x.float()", "torch.addcmul(x, x, x)", "x.mean(-1)", "F.kl_div(x, x, reduction='sum')",
    "torch.dot(x[0], w[0])",
    "F.nll_loss(x, t)", "x.prod(0)", "x.logsumexp(0)", "torch.bmm(x[None], w[None])",
    "F.binary_cross_entropy_with_logits(x, x)", "F.cosine_similarity(x, x)", "F.prelu(x, w[0, :1])",
    "torch.sigmoid(x)", "F.embedding(t, w)", "F.group_norm(x[..., None], 4)",
]  # fmt: skip
UNLINKED = "not linked with support for cuda"  # views of fake CUDA tensors, on the CPU build


class Written(TorchDispatchMode):
    """Writes down each operation's name with the shapes and dtypes of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        if not str(func).startswith(("prim", "aten.detach", "aten.alias")):
            sizes = " ".join(f"{tuple(each.shape)}{str(each.dtype)[5:]}" for each in found)
            self.lines.append(f"{func} {sizes}")
        return result


def test_the_lists_of_autocast_are_those_of_the_installed_pytorch() -> None:
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    if not header.exists():
        pytest.skip("this PyTorch came without its headers")
    text = header.read_text()
    for macro, ours in (
        ("AT_FORALL_LOWER_PRECISION_FP", autocast.LOWER),
        ("AT_FORALL_FP32", autocast.FP32),
        ("AT_FORALL_FP32_SET_OPT_DTYPE", autocast.FP32_DTYPE),
        ("AT_FORALL_PROMOTE", autocast.PROMOTE),
    ):
        body = re.search(rf"#define {macro}\(_\)(.*?)\n\n", text, re.S)
        assert body is not None
        listed = re.findall(r"\b_\(([\w, ]+)\)", body[1])
        assert sorted(ours) == sorted(name.replace(", ", ".") for name in listed)


def test_dtypes_under_autocast_are_those_of_pytorchs_own_cuda_kernels() -> None:
    """The oracle: C++ autocast of CUDA over fake CUDA tensors, in a process of its own."""
    code = f"""
import json, torch, torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from test_ways import Written
said = {{}}
with torch.no_grad(), FakeTensorMode():
    x = torch.empty(16, 64, dtype=torch.bfloat16, device="cuda")
    w = torch.empty(64, 64, device="cuda")
    t = torch.empty(16, dtype=torch.long, device="cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    for call in {CALLS!r}:
        with Written() as written:
            try:
                eval(call)
            except RuntimeError as error:
                assert {UNLINKED!r} in str(error), error
                continue
        said[call] = written.lines
print(json.dumps(said))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120,
        env=CHILD, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    theirs = json.loads(done.stdout)
    assert len(theirs) > 25

    ours = {}
    with torch.no_grad(), ways_of(H100):
        x = torch.empty(16, 64, dtype=torch.bfloat16, device="meta")
        w = torch.empty(64, 64, device="meta")
        t = torch.empty(16, dtype=torch.long, device="meta")
        with torch.autocast("cuda", torch.bfloat16):
            for call in theirs:
                with Written() as written:
                    eval(call, {"torch": torch, "F": F, "x": x, "w": w, "t": t})
                ours[call] = written.lines
                torch.clear_autocast_cache()
    assert ours == theirs


def test_a_weight_is_cast_once_in_a_context_and_anew_in_the_next() -> None:
    weight = torch.nn.Parameter(torch.empty(8, 8, device="meta"))
    x = torch.empty(4, 8, device="meta", dtype=torch.bfloat16)
    with ways_of(H100), Written() as written:
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                F.linear(x, weight)
                F.linear(x, weight)
    assert sum("_to_copy" in line for line in written.lines) == 2


def test_autocast_is_off_where_the_model_says_so_and_gone_after_the_trace() -> None:
    x, w = torch.empty(4, 8, device="meta"), torch.empty(8, 8, device="meta")
    with ways_of(H100):
        with torch.autocast("cuda", torch.bfloat16):
            assert (x @ w).dtype == torch.bfloat16
            assert torch.is_autocast_enabled("cuda")
            with torch.autocast("meta", enabled=False):
                assert (x @ w).dtype == torch.float32
        assert (x @ w).dtype == torch.float32
    with pytest.warns(UserWarning, match="CUDA is not available"):
        assert not torch.autocast("cuda", torch.bfloat16)._enabled


def attention(runtime: Runtime, dtype=torch.bfloat16, *, head=64, kv_heads=4, **options) -> str:
    query = torch.empty(2, 4, 32, head, device="meta", dtype=dtype, requires_grad=True)
    key = torch.empty(2, kv_heads, 32, head, device="meta", dtype=dtype, requires_grad=True)
    with kernels_of(runtime), ways_of(runtime) as ways:
        F.scaled_dot_product_attention(query, key, key, **options).sum().backward()
    (kernel,) = ways.attention
    return kernel


def card(*capability: int) -> Runtime:
    return Runtime(device="cuda", attention="flash", capability=capability)


MASK = torch.empty(2, 1, 32, 32, device="meta", dtype=torch.bool)


@pytest.mark.parametrize(
    ("runtime", "options", "kernel"),
    [
        (card(9, 0), {}, "cudnn"),
        (card(10, 0), {}, "cudnn"),
        (card(8, 0), {}, "flash"),
        (card(8, 9), {}, "flash"),
        (card(12, 0), {}, "flash"),
        (card(7, 5), {"dtype": torch.float16}, "efficient"),
        (card(7, 5), {"dtype": torch.float32}, "efficient"),
        (card(7, 5), {}, "math"),  # bf16 before Ampere
        (card(8, 0), {"dtype": torch.float32}, "efficient"),
        (card(8, 0), {"dtype": torch.float64}, "math"),
        (card(8, 0), {"attn_mask": MASK}, "efficient"),
        (card(9, 0), {"attn_mask": MASK}, "cudnn"),
        (card(9, 0), {"dropout_p": 0.125}, "cudnn"),
        (card(9, 0), {"dropout_p": 0.1}, "flash"),  # cuDNN drops in sixteenths
        (card(9, 0), {"head": 256}, "flash"),
        (card(8, 9), {"head": 208}, "efficient"),  # flash's backward needs more shared memory
        (card(8, 0), {"head": 208}, "flash"),
        (card(8, 0), {"head": 320}, "efficient"),
        (card(8, 0), {"head": 20}, "flash"),  # padded to 24
        (card(8, 0), {"kv_heads": 2, "enable_gqa": True}, "flash"),
        (card(8, 0), {"kv_heads": 2, "enable_gqa": True, "attn_mask": MASK}, "math"),
        (CPU, {"dtype": torch.float32}, "cpu"),
        (CPU, {"dtype": torch.float32, "dropout_p": 0.1}, "math"),
    ],
)
def test_attention_runs_with_the_kernel_of_the_card(runtime, options, kernel) -> None:
    assert attention(runtime, **options) == kernel


def test_sdpa_kernel_is_obeyed_and_an_impossible_choice_refused() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert attention(card(9, 0)) == "math"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        assert attention(card(9, 0)) == "efficient"
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="No available"):
        attention(T4, torch.float32)


def kept_by(runtime: Runtime, call) -> list[str]:
    """What autograd keeps for the backward pass of a call on (4, 8) bf16."""
    kept: list[str] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]}")
        return tensor

    with (
        kernels_of(runtime), ways_of(runtime),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):  # fmt: skip
        call(torch.empty(4, 8, device="meta", dtype=torch.bfloat16, requires_grad=True))
    return sorted(kept)


def test_rms_norm_and_dropout_are_one_kernel_on_cuda_and_several_on_the_cpu() -> None:
    def norm(x):
        return F.rms_norm(x, (8,))

    def drop(x):
        return F.dropout(x, 0.5)

    assert kept_by(H100, norm) == ["(4, 1) float32", "(4, 8) bfloat16"]
    assert len(kept_by(CPU, norm)) > 2
    assert kept_by(H100, drop) == ["(4, 8) bool"]
    assert kept_by(CPU, drop) == ["(4, 8) bfloat16"]


def test_rms_norm_with_a_weight_of_another_dtype_falls_apart_as_on_cuda() -> None:
    weight = torch.empty(8, device="meta", requires_grad=True)
    assert len(kept_by(H100, lambda x: F.rms_norm(x, (8,), weight))) > 3


def test_tensors_with_data_are_left_alone() -> None:
    with ways_of(H100), torch.autocast("cuda", torch.bfloat16):
        one = torch.ones(2, 2)
        assert (one @ one).dtype == torch.float32
        assert (one @ one).tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_warnings_about_the_meta_device_are_dropped_and_the_users_own_are_kept() -> None:
    modules = ("torch.amp.autocast_mode", "snugpt.tracing.ways", "torchvision", "model")

    def warn() -> None:
        with users_code("testing"):
            for name in modules:
                warnings.warn_explicit(f"of {name}", UserWarning, f"{name}.py", 1, module=name)

    with pytest.warns(UserWarning, match="of (torchvision|model)") as caught:
        warn()
    assert [str(each.message) for each in caught] == ["of torchvision", "of model"]


def test_an_interrupt_is_let_through_and_everything_else_said() -> None:
    with pytest.raises(KeyboardInterrupt), users_code("testing"):
        raise KeyboardInterrupt
    said = r"test_ways\.py:\d+: `raise SystemExit\(0\)` raised SystemExit"
    with pytest.raises(FailedError, match=said), users_code("testing"):
        raise SystemExit(0)

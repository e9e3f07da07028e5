"""Inductor's CUDA memory plan of a function, read on a machine without a card.

PyTorch's CUDA wheel compiles for CUDA anywhere; only running needs the card. The function is traced
under FakeTensorMode on the CPU, at full size and with nothing allocated. Where Inductor takes over,
the forward and backward graphs are said to be on cuda:0 and its own lowering writes the wrapper
that would run. That wrapper then runs on meta tensors with kernels that do nothing, and a counter
follows what is alive: which buffers are freed, reused or written in place is Inductor's decision.

Not seen: what a kernel takes for itself (attention's backward, cuBLAS).
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, scheduler
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget

BLOCK_BYTES = 512  # the CUDA allocator rounds every tensor up to this
CARD = torch.device("cuda:0")
MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132}  # A100, H100; Inductor splits reductions by it


@dataclass
class Plan:
    """A compiled graph: its wrapper as source, and the FX graph it was made from."""

    code: str
    graph: torch.fx.GraphModule


@dataclass
class Plans:
    """What one torch.compile call led to."""

    forward: list[Plan] = field(default_factory=list)
    backward: list[Plan] = field(default_factory=list)


class PlanReadError(Exception):
    """Carries the wrapper's source out of Inductor."""


def inner_compile(plans: Plans, capability: tuple[int, int]) -> Callable:
    """Stands for `compile_fx_inner`: the real one, up to where the wrapper would be run."""

    def read(graph, inputs, *, is_backward: bool = False, **options):
        say_cuda(graph, inputs)
        with pretended_card(capability), mock.patch.object(
            GraphLowering, "compile_to_module", lambda self: raise_code(self.codegen()[0].value)
        ), inductor_config.patch(force_disable_caches=True):  # fmt: skip
            try:
                compile_fx.compile_fx_inner(graph, inputs, is_backward=is_backward, **options)
            except Exception as error:
                code = code_in(error)
        (plans.backward if is_backward else plans.forward).append(Plan(code, graph))
        results = [None if node is None else node.meta["val"] for node in outputs_of(graph)]

        def run(_):
            return results

        run._boxed_call = True
        return run

    return read


def raise_code(code: str):
    raise PlanReadError(code)


def code_in(error: BaseException | None) -> str:
    """The source that `PlanReadError` carries, however Inductor wrapped it."""
    first = error
    while error is not None:
        if isinstance(error, PlanReadError):
            return error.args[0]
        error = error.__cause__ or error.__context__
    raise first


def outputs_of(graph: torch.fx.GraphModule) -> list:
    return next(node for node in graph.graph.nodes if node.op == "output").args[0]


def placeholders_of(graph: torch.fx.GraphModule) -> list:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def say_cuda(graph: torch.fx.GraphModule, inputs) -> None:
    """Every tensor of the graph is on the card, and every factory puts its result there."""
    values = [node.meta.get("val") for node in graph.graph.nodes]
    for tensor in tree_leaves([inputs, values]):
        if isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cpu":
            tensor.fake_device = CARD
    for node in graph.graph.nodes:
        if node.kwargs.get("device") == torch.device("cpu"):
            node.kwargs = {**node.kwargs, "device": CARD}
    graph.recompile()


@contextmanager
def pretended_card(capability: tuple[int, int]) -> Iterator[None]:
    """Answers for what Inductor asks the card while it plans."""
    major, minor = capability
    properties = types.SimpleNamespace(
        name="card", major=major, minor=minor, total_memory=80 << 30, warp_size=32,
        multi_processor_count=MULTIPROCESSORS[capability], max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
        shared_memory_per_block_optin=163 << 10, L2_cache_size=40 << 20, gcnArchName="",
    )  # fmt: skip
    answers = [
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (torch.cuda, "get_device_capability", lambda *_: capability),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: properties)),
        (CudaInterface, "get_device_properties", staticmethod(lambda *_: properties)),
        (CudaInterface, "get_compute_capability", staticmethod(lambda *_: 10 * major + minor)),
        (CudaInterface, "is_bf16_supported", staticmethod(lambda *_, **__: True)),
        (scheduler, "has_triton", lambda: True),
    ]
    target = GPUTarget("cuda", 10 * major + minor, 32)
    triton.runtime.driver.set_active(
        types.SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    )
    with ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer))
        yield


def plan(
    trace: Callable[[Callable], None], capability: tuple[int, int] = (9, 0)
) -> tuple[Plan, Plan]:
    """Plans of the one graph that `trace` compiles; it is given an inner_compile to use."""
    plans = Plans()
    torch._dynamo.reset()
    with functorch_config.patch(force_non_lazy_backward_lowering=True):
        trace(inner_compile(plans, capability))
    (forward,), (backward,) = plans.forward, plans.backward
    return forward, backward


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.highest = 0
        self.sizes: dict[int, int] = {}
        self.log: list[tuple[str, str, int]] = []

    def follow(self, tensor: torch.Tensor, *, counted: bool = True) -> None:
        """Count a tensor's storage from here on, once; weights are followed but not counted."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES if counted else 0
        self.sizes[key] = size
        self.bytes += size
        self.highest = max(self.highest, self.bytes)
        text = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        self.log.append(("+", text, self.bytes))
        weakref.finalize(storage, self.freed, key, text)

    def freed(self, key: int, text: str) -> None:
        self.bytes -= self.sizes.pop(key)
        self.log.append(("-", text, self.bytes))

    def bytes_of(self, tensor: torch.Tensor) -> int:
        return self.sizes[tensor.untyped_storage()._cdata]

    def restart(self) -> None:
        """Forget the highest sum and the log."""
        self.highest, self.log = self.bytes, []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.follow(tensor)
        return result


class NoKernel:
    """A Triton kernel that does nothing."""

    def run(self, *args, **kwargs) -> None:
        pass


class NoCompiler:
    """Stands for Inductor's AsyncCompile."""

    def triton(self, *args, **kwargs) -> NoKernel:
        return NoKernel()

    def wait(self, scope) -> None:
        pass


GUARDS = "torch._C._dynamo.guards."
STANDS_FOR = {
    "async_compile = AsyncCompile()": "async_compile = NO_COMPILER",
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": (
        "get_raw_stream = lambda index: 0"
    ),
    f"from {GUARDS[:-1]} import copy_if_misaligned": "copy_if_misaligned = lambda tensor: tensor",
    f"{GUARDS}_empty_strided_cuda": (
        "lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device='meta')"
    ),
    f"{GUARDS}_reinterpret_tensor": (
        "lambda tensor, size, stride, offset=0:"
        " tensor.as_strided(size, stride, tensor.storage_offset() + offset)"
    ),
    f"{GUARDS}assert_size_stride": "lambda *_: None",
    f"{GUARDS}assert_alignment": "lambda *_: None",
    "with torch.cuda._DeviceGuard(0):": "if True:",
    "torch.cuda.set_device(0)": "pass",
}


def runnable(plan: Plan) -> Callable[[list], tuple]:
    """The wrapper's `call`, with meta tensors for the card's and no kernels."""
    code = plan.code
    for said, instead in STANDS_FOR.items():
        code = code.replace(said, instead)
    scope = {"NO_COMPILER": NoCompiler(), "__name__": "wrapper"}
    exec(compile(code, "wrapper", "exec"), scope)
    return scope["call"]


def meta(value: torch.Tensor) -> torch.Tensor:
    """A meta tensor of a fake one's layout."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

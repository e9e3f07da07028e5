"""Allocations of a model we do not know: named by its own modules and lines.

A tensor of the forward pass is named by the module that was running, the operation and the line; a
tensor of the backward pass by the module whose forward made the autograd node that runs.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from snugpt.errors import FailedError
from snugpt.spec.memory import Phase
from snugpt.spec.runtime import Runtime
from snugpt.tracing.allocations import Allocations, operation_name
from snugpt.tracing.kernels import scratch_of
from snugpt.tracing.refusals import OUR_FOLDER, TORCH_FOLDER, MixedDevicesError

aten = torch.ops.aten
# A tensor of the host may be read by these on CUDA too.
FROM_HOST = {"_to_copy", "copy_", "index", "index_put", "index_put_", "_unsafe_index", "copy"}
LIBRARY = {  # operations whose libraries take a workspace that nobody counts here
    "convolution": "cuDNN convolutions",
    "convolution_backward": "cuDNN convolutions",
    "_scaled_dot_product_cudnn_attention_backward": "cuDNN attention",
    "native_batch_norm": "cuDNN batch norms",
}
# A loop unrolled over the batch makes a graph so deep that PyTorch ends the process over it. A
# model of 48 layers has some 30,000 operations in two steps.
MOST_OPERATIONS = 250_000
NO_SEQUENCE = 2**63  # nodes that only accumulate have no number of their own


class ModelAllocations(Allocations):
    """Allocations with names from a model: `h.3.mlp.c_fc: addmm (model.py:81)`."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(scratch_of(runtime))
        self.uncounted: set[str] = set()
        self._num_operations = 0
        self._paths: dict[int, str] = {}  # id of a module -> its path
        self._running: list[str] = [""]
        self._numbers: list[int] = [0]  # autograd's counter where the running module changed
        self._modules: list[str] = [""]

    def about_to_run(self, func, args) -> None:
        """Refuse what CUDA would refuse; note what no figure is known for."""
        self._num_operations += 1
        if self._num_operations > MOST_OPERATIONS:
            raise FailedError(
                f"the step has more than {MOST_OPERATIONS:,} operations, a loop that grows with the"
                " batch or the sequence",
                hint="snugpt trace MODULE:NAME --batch-size 1 --seq-len 128",
            )
        name = func._schema.name.removeprefix("aten::")
        if name in LIBRARY:
            self.uncounted.add(LIBRARY[name])
        if name not in FROM_HOST and _mixes(args):
            raise MixedDevicesError(name)

    @property
    def phase(self) -> Phase:
        """The phase that was marked last."""
        return self._stretches[-1].phase

    @contextmanager
    def naming(self, model: nn.Module) -> Iterator[None]:
        """Follow which of the model's modules runs."""
        self._paths = {id(each): path for path, each in model.named_modules()}

        def enter(module, _):
            if id(module) in self._paths:
                self._running.append(self._paths[id(module)])
                self._note()

        def leave(module, *_):
            if id(module) in self._paths and len(self._running) > 1:
                self._running.pop()
                self._note()

        handles = (
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._modules.append(self._running[-1])

    def _site(self, func) -> str:
        node = torch._C._current_autograd_node()
        operation = "" if func is None else operation_name(func).partition(".")[0]
        if node is not None and node._sequence_nr() < NO_SEQUENCE:
            place = bisect_right(self._numbers, node._sequence_nr()) - 1
            return f"{self._modules[place] or 'model'}: backward, {operation}"
        line = _line()
        return f"{self._running[-1] or 'model'}: {operation}" + (f" ({line})" if line else "")


def _line() -> str:
    """The innermost line outside PyTorch and us."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((TORCH_FOLDER, OUR_FOLDER, "<")):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _mixes(args) -> bool:
    """Whether tensors of the meta device and of the host, single values apart, come together."""
    host = meta = False
    for each in args:
        for tensor in each if isinstance(each, tuple | list) else (each,):
            if isinstance(tensor, Tensor):
                if tensor.is_meta:
                    meta = True
                elif tensor.dim():
                    host = True
    return host and meta

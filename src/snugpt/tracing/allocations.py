"""Allocations: every storage that is made and freed while code runs on the meta device.

Tensors on the meta device have shapes, dtypes and storages, but no memory: a training step of any
size runs there in seconds and a few MB. A dispatch mode sees each operation's results; a storage is
alive from the operation that made it until its last reference goes, which a weak reference reports
at the very moment. Both are Python's and autograd's own doing, so the order is that of a real run.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from snugpt.estimate.operations import Buffer
from snugpt.estimate.timeline import Event, Placed, Segment, Timeline
from snugpt.model.host_memory import is_host
from snugpt.spec.memory import Category, Phase

ADD, ADD_IN_PLACE = torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor
INTERNAL = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
Scratch = Callable[..., tuple[int, ...]]  # (operation, arguments, result) -> bytes inside a kernel


@dataclass(slots=True, eq=False)
class Block:
    """One storage: its bytes, where it was made, and what it is once that is known."""

    bytes: int
    name: str
    category: Category

    def buffer(self) -> Buffer:
        """The block as the timeline's reader wants it."""
        return Buffer(self.name, self.category, self.bytes, 0, f"{self.bytes:,}")


@dataclass(slots=True)
class Stretch:
    """What happened in one phase, from its mark to the next."""

    phase: Phase
    events: list[tuple[int, Block]] = field(default_factory=list)


class Allocations(TorchDispatchMode):
    """Record storages on the meta device from `with` to the end of the block.

        with Allocations() as allocations:
            model = build(..., device="meta")
            allocations.begin("forward")     # what is alive now lies in memory before the step
            step(model, ..., mark=allocations.mark)
        allocations.timeline(block_bytes=512)

    `scratch(operation, arguments, result)` tells what the operation's kernel would take for itself
    while it runs. `site_in` limits names to files below a folder.
    """

    def __init__(self, scratch: Scratch | None = None, site_in: str = "") -> None:
        super().__init__()
        self._scratch, self._site_in = scratch, site_in
        self._alive: dict[int, tuple[weakref.ref, Block]] = {}  # by the storage's address
        self._told: list[Block] = []
        self._resident: list[Block] = []
        self._host: dict[int, Block] = {}  # what stands for host memory, by address
        self._stretches = [Stretch("forward")]
        self._recording = False

    def __enter__(self):
        _counts_if_held_once()  # looked at before, not in the middle of a backward pass
        self._recording = True
        return super().__enter__()

    def __exit__(self, *error):
        self._recording = False
        return super().__exit__(*error)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a wrapper around the dispatch would hide who called

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.about_to_run(func, args)
        if func is ADD and called_by_engine() and is_held_once(args[0]):
            return ADD_IN_PLACE(*args)
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.device.type == "meta":
                self.see(each, func)
        if self._scratch is not None:
            for num_bytes in self._scratch(func, args, result):
                inside = Block(num_bytes, f"inside {operation_name(func)}", "workspace")
                self._events.append((1, inside))
                self._told.append(inside)
            while self._told:
                self._events.append((-1, self._told.pop()))
        return result

    def about_to_run(self, func, args) -> None:
        """Look at an operation before it runs; for those who know more of the model."""

    @property
    def phase(self) -> Phase:
        """The phase that was marked last."""
        return self._stretches[-1].phase

    @property
    def _events(self) -> list[tuple[int, Block]]:
        return self._stretches[-1].events

    def see(self, tensor: Tensor, func=None) -> Block:
        """Return the tensor's block; its storage is recorded if it was not seen before."""
        storage = tensor.untyped_storage()
        if is_host(storage):
            return self._see_host(storage)
        address = storage._cdata
        found = self._alive.get(address)
        if found is not None:
            return found[1]
        site = self._site(func)
        block = Block(storage.nbytes(), site, self.category_of(tensor, site))
        self._alive[address] = weakref.ref(storage, lambda _: self._freed(address)), block
        self._events.append((1, block))
        return block

    def _see_host(self, storage: torch.UntypedStorage) -> Block:
        """The block of a storage that stands for host memory: counted apart, not an event."""
        address = storage._cdata
        if address not in self._host:
            self._host[address] = Block(storage.nbytes(), "host memory", "activations")
            weakref.finalize(storage, self._host.pop, address, None)
        return self._host[address]

    def category_of(self, tensor: Tensor, site: str) -> Category:
        """What a new storage is, as far as its making shows; for those who know more of the model.

        `site` is the line that made it.
        """
        return "activations"

    def label(self, tensor: Tensor, category: Category, name: str) -> None:
        """Say what a tensor is; its storage carries the name from the beginning."""
        block = self.see(tensor)
        block.category, block.name = category, name

    def tell(self, num_bytes: int, category: Category, name: str) -> None:
        """Add a block that lies in memory from here on and that no tensor shows."""
        self._events.append((1, Block(num_bytes, name, category)))

    def begin(self, phase: Phase) -> None:
        """Take what is alive now as lying in memory, and start the timeline here."""
        alive = dict.fromkeys(self._resident)
        for stretch in self._stretches:
            for sign, block in stretch.events:
                if sign > 0:
                    alive[block] = None
                else:
                    alive.pop(block, None)
        self._resident, self._stretches = list(alive), [Stretch(phase)]

    def mark(self, phase: Phase) -> None:
        """Say that `phase` begins here; it lasts until the next mark."""
        if self._stretches[-1].phase != phase:
            self._stretches.append(Stretch(phase))

    def timeline(self, block_bytes: int) -> Timeline:
        """What was recorded since `begin`, every storage rounded up to `block_bytes`."""
        buffers: dict[Block, Buffer] = {}

        def buffer(block: Block) -> Buffer:
            return buffers.setdefault(block, block.buffer())

        placed = tuple(
            Placed(
                stretch.phase,
                -1,
                Segment([Event(sign, buffer(b)) for sign, b in stretch.events], block_bytes),
            )
            for stretch in self._stretches
        )
        resident = tuple(buffer(b) for b in self._resident)
        host = tuple(buffer(b) for b in self._host.values())
        return Timeline(resident, placed, block_bytes, host=host)

    def _freed(self, address: int) -> None:
        _, block = self._alive.pop(address)
        if self._recording:
            self._events.append((-1, block))

    def _site(self, func) -> str:
        """The innermost line outside PyTorch, with the operation: `gpt.py:97 Block.mlp`."""
        frame = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(self._site_in) and not code.co_filename.startswith(
                INTERNAL
            ):
                return f"{code.co_qualname} {Path(code.co_filename).name}:{frame.f_lineno}"
            frame = frame.f_back
        return operation_name(func)


def called_by_engine() -> bool:
    """Whether the operation being dispatched was called by autograd's engine itself."""
    return sys._getframe(2).f_code is _engine_run_backward.__code__


def is_held_once(gradient: Tensor) -> bool:
    """Whether nobody but the engine holds a gradient that a second one is to be added to.

    The engine would then add in place (input_buffer.cpp, `can_accumulate_inplace`), but not while
    any dispatch mode is on. The trace puts that right.
    """
    storage = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
    return (gradient._use_count(), storage) == _counts_if_held_once()


@cache
def _counts_if_held_once() -> tuple[int, int]:
    """Both counts as a dispatch mode sees them, of a gradient that the engine alone holds."""
    seen: list[tuple[int, int]] = []

    class Probe(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is ADD and called_by_engine():
                self.look(args[0])
            return func(*args, **(kwargs or {}))

        def look(self, gradient: Tensor) -> None:
            storage = torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
            seen.append((gradient._use_count(), storage))

    with torch.enable_grad(), _disable_current_modes(), Probe():
        x = torch.empty(2, device="meta", requires_grad=True) * 2
        ((x * 3) * (x * 4)).sum().backward()
    return seen[0]


def operation_name(func) -> str:
    """`aten.mm.default` without the namespace and the default overload."""
    return str(func).removeprefix("aten.").removesuffix(".default")

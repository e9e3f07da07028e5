"""The lever `offload = activations`: what a layer keeps for its backward waits in host memory.

    forward of layer i    each kept tensor is copied to the host as soon as it is kept
    its end               layer i - 1 is let go: its copies had all of layer i to end in
    backward of layer i   begins with asking for layer i - 1, which has all of layer i to arrive in

So the tensors of two layers are on the device at a time, and not of all. The last layer is not
moved: it is wanted back at once. A tensor that two operations keep is one storage and moves once.

The device's memory is taken and given back by the stream that computes. It waits for a copy before
it lets go of what was read and before it uses what was written, so memory comes back at the same
point of every step, and the host waits for nothing.

What stays: weights; what is smaller than a sixteenth of the layer's input (a copy costs a launch,
and all of these together are some per cent of a layer); whole numbers (token ids, which the caller
holds anyway, and seeds); and the first layer's input where the norm before it keeps that.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from snugpt.estimate.offload import SMALLEST_PART
from snugpt.model.copies import copies_for
from snugpt.model.gpt import GPT
from snugpt.model.host_memory import HostPool


class Moved:
    """One storage of a layer as bytes on the device, None while they are on the host alone.

    The operations that keep it hold it through `Kept`; the last of them frees it.
    """

    __slots__ = ("on_device", "on_host")

    def __init__(self, on_device: Tensor, on_host: Tensor) -> None:
        self.on_device: Tensor | None = on_device  # (bytes,) uint8
        self.on_host = on_host  # (bytes,) uint8


class Kept(NamedTuple):
    """What stands in the graph for a tensor: itself where it stays, else a view of what moved."""

    layer: Layer
    tensor: Tensor | None
    moved: Moved | None = None
    dtype: torch.dtype = torch.uint8
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0


class Layer(saved_tensors_hooks):
    """One layer in one pass, a context around its forward; the graph holds it until its backward.

    It knows the layer before it until it has asked for that one's tensors.
    """

    def __init__(self, offload: ActivationOffload, before: Layer | None) -> None:
        super().__init__(self.pack, unpack)
        self.offload, self.before = offload, before
        self.moves = True
        self.input_bytes = 0
        self.stays: set[int] = set()  # addresses of storages that somebody else holds
        self.moved: dict[int, Moved] = {}  # by the address of the storage
        self.copied = self.arrived = None  # events of the copies to the host and back

    def pack(self, tensor: Tensor) -> Kept:
        """Called with each tensor an operation keeps, and once more if another keeps it too."""
        storage = tensor.untyped_storage()
        if (
            not self.moves
            or storage._cdata in self.stays
            or storage.nbytes() * SMALLEST_PART < self.input_bytes
            or not (tensor.is_floating_point() or tensor.dtype == torch.bool)
        ):
            return Kept(self, tensor)
        moved = self.moved.get(storage._cdata)
        if moved is None:
            moved = self.moved[storage._cdata] = self._sent(storage)
        view = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
        return Kept(self, None, moved, *view)

    def _sent(self, storage: torch.UntypedStorage) -> Moved:
        on_device = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        on_host = self.offload.next_place(on_device.numel())
        self.offload.copies.to_host(on_device, on_host)
        return Moved(on_device, on_host)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.pack_hook = None  # a method of this object would keep it alive
        self.copied = self.offload.copies.sent()
        if self.before is not None:
            self.before.let_go()
        if error[0] is not None:  # out of memory, say: there will be no backward
            self.offload.give_up()

    def let_go(self) -> None:
        """Give the device's memory back, once it has been copied."""
        self.offload.copies.wait(self.copied)
        for moved in self.moved.values():
            moved.on_device = None

    def ask(self) -> None:
        """Have everything brought back to the device; it is there once `arrived` has passed."""
        for moved in self.moved.values():
            moved.on_device = torch.empty_like(moved.on_host, device=self.offload.device)
        pairs = [(moved.on_host, moved.on_device) for moved in self.moved.values()]
        self.arrived = self.offload.copies.to_device(pairs)
        self.moved.clear()  # from here on the graph alone holds them

    def begin_backward(self) -> None:
        """At the first of its tensors that is wanted: have them here, and ask for the next."""
        arrived, before = self.arrived, self.before
        self.arrived = self.before = None
        self.offload.copies.wait(arrived)
        if before is not None:
            before.ask()


def unpack(kept: Kept) -> Tensor:
    """The tensor as it was kept: called by each operation of the backward pass."""
    kept.layer.begin_backward()
    if kept.moved is None:
        return kept.tensor
    return kept.moved.on_device.view(kept.dtype).as_strided(kept.size, kept.stride, kept.offset)


def offload_activations(model: GPT) -> ActivationOffload:
    """Have what the model's layers keep moved to the host and back from now on."""
    shape = model.shape
    kept = shape.style == "nanochat" and not shape.dropout  # by the norm of the embedding
    offload = ActivationOffload(shape.num_layers, first_input_is_kept=kept)
    model.around_layer = offload.layer
    return offload


class ActivationOffload:
    """Moves what the layers of a model keep; `layer` goes around the forward of each."""

    def __init__(self, num_layers: int, first_input_is_kept: bool) -> None:
        self.num_layers, self.first_input_is_kept = num_layers, first_input_is_kept
        self.copies_for = copies_for
        self._input: tuple[torch.device, torch.Size] | None = None
        self._last: Layer | None = None
        self._places: list[Tensor] = []
        self._num_taken = 0

    def layer(self, block: torch.nn.Module, x: Tensor) -> AbstractContextManager:
        """The context to run one layer in; x is what enters it. Layers come in their order."""
        if not torch.is_grad_enabled():
            return nullcontext()
        first, last = block.layer == 0, block.layer == self.num_layers - 1
        if first:
            self._begin_pass(x)
        found = Layer(self, self._last)
        found.moves, found.input_bytes = not last, x.nbytes
        found.stays = {weight.untyped_storage()._cdata for weight in block.parameters()}
        if first and self.first_input_is_kept:
            found.stays.add(x.untyped_storage()._cdata)
        self._last = None if last else found
        return found

    def give_up(self) -> None:
        """Hold nothing of the pass that is under way."""
        self._last = None

    def _begin_pass(self, x: Tensor) -> None:
        """Begin at the first place again; a batch of another size has places of its own."""
        self._last, self._num_taken = None, 0
        if self._input != (x.device, x.shape):
            self._input = self.device, _ = x.device, x.shape
            self.copies = self.copies_for(x.device)
            self._places, self._pool = [], HostPool(x.device)

    def next_place(self, num_bytes: int) -> Tensor:
        """The next place on the host, the same one in every pass: all passes are alike."""
        if self._num_taken == len(self._places):
            self._places.append(self._pool.take(num_bytes))
        self._num_taken += 1
        return self._places[self._num_taken - 1]

"""Host memory: pinned where a GPU copies from it, ordinary on the CPU, unreal in a trace.

Everything of the lever `offload` that lies in host memory is made by `host_empty`, so that a trace
can tell it from the device's memory: on the meta device nothing has an address.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from snugpt.estimate.host import Slabs

_on_meta: dict[int, weakref.ref] = {}  # host storages of traces, by the storage's address


def host_empty(num_bytes: int, device: torch.device) -> Tensor:
    """Bytes in host memory for copies from and to `device`: (num_bytes,) uint8, values not set."""
    if device.type == "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    if device.type != "meta":
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    with _disable_current_modes():  # a trace is not to take it for the device's
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
    storage = buffer.untyped_storage()
    address = storage._cdata
    _on_meta[address] = weakref.ref(storage, lambda _: _on_meta.pop(address, None))
    return buffer


def is_host(storage: torch.UntypedStorage) -> bool:
    """Whether a storage of the meta device stands for host memory."""
    return storage._cdata in _on_meta


class HostPool:
    """Host memory that is taken piece by piece and kept for the next step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slabs = Slabs()
        self._buffers: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        """A piece of host memory, (num_bytes,) uint8; it lives as long as the pool or itself."""
        place = self._slabs.place(num_bytes)
        if place.slab == len(self._buffers):
            self._buffers.append(host_empty(self._slabs.sizes[place.slab], self.device))
        return self._buffers[place.slab][place.start : place.start + num_bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory that the pool holds."""
        return sum(self._slabs.sizes)

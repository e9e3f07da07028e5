"""Copies between device and host at the worst moments that streams allow."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from snugpt.model.copies import Copies

POISON = 0xFF  # bytes of it are no number in any format


class LateCopies(Copies):
    """A copy is made when it is waited for, and its target is poison from the call on.

    A source on the device must live until then. `host_bytes` and `device_bytes` count what was sent
    to each; `on_wait` is told whether a wait is for the newest copies to the device.
    """

    def __init__(self) -> None:
        self.queue: list[tuple[Callable[[], Tensor | None], Tensor]] = []
        self.done = self.host_bytes = self.device_bytes = self.newest = 0
        self.on_wait: Callable[[bool], None] = lambda _: None

    def to_host(self, source: Tensor, target: Tensor) -> None:
        target.fill_(POISON)
        self.host_bytes += target.numel()
        self.queue.append((_weak(source), target))

    def sent(self) -> int:
        return len(self.queue)

    def to_device(self, pairs, after: int | None = None) -> int:
        self._make(after)
        for source, target in pairs:
            target.fill_(POISON)
            self.device_bytes += target.numel()
            self.queue.append((lambda source=source: source, target))
        self.newest = len(self.queue)
        return self.newest

    def wait(self, event: int | None) -> None:
        self.on_wait(event == self.newest and self.done < self.newest)
        self._make(event)

    def _make(self, event: int | None) -> None:
        while event is not None and self.done < event:
            source, target = self.queue[self.done]
            found = source()
            assert found is not None, "let go before it was copied"
            target.copy_(found)
            self.done += 1


def _weak(tensor: Tensor) -> Callable[[], Tensor | None]:
    """The tensor, as long as anything else holds its storage."""
    storage = weakref.ref(tensor.untyped_storage())
    offset, size = tensor.storage_offset(), tensor.shape

    def found() -> Tensor | None:
        held = storage()
        return None if held is None else torch.empty(0, dtype=torch.uint8).set_(held, offset, size)

    return found

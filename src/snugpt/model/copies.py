"""Copies between device and host: on their own streams on CUDA, at once elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Copies:
    """Copies that have happened when the call returns: the CPU, and traces."""

    def to_host(self, source: Tensor, target: Tensor) -> None:
        """Copy to host memory what the device has computed up to here."""
        target.copy_(source)

    def sent(self):
        """An event that passes when everything given to `to_host` has been copied."""

    def to_device(self, pairs: Sequence[tuple[Tensor, Tensor]], after=None):
        """Copy each (host, device) pair; return an event that passes when all are there.

        The copies begin when the event `after` has passed.
        """
        for source, target in pairs:
            target.copy_(source)

    def wait(self, event) -> None:
        """Let nothing that is computed after this begin before the event has passed."""


class CudaCopies(Copies):
    """Copies beside the computing stream, one stream each way: PCIe carries both at once.

    Memory belongs to the computing stream. A copy begins after what that stream was given before
    the call, and whoever frees or uses a copied tensor waits for its event first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_host(self, source: Tensor, target: Tensor) -> None:
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            target.copy_(source, non_blocking=True)

    def sent(self):
        return self._out.record_event()

    def to_device(self, pairs, after=None):
        if after is not None:
            self._in.wait_event(after)
        self._in.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._in):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        return self._in.record_event()

    def wait(self, event) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


def copies_for(device: torch.device) -> Copies:
    """The copies of a device."""
    return CudaCopies(device) if device.type == "cuda" else Copies()

"""nanochat's optimizer step: its state, its transients, and what its collectives leave alive.

From October 2025 to this day the distributed optimizers wait on a collective's *future* and never
on its *work*. ProcessGroupNCCL (PyTorch 2.7 and later) keeps the inputs and outputs of a collective
that nobody waited for, and drops them when the main thread next calls one: in the optimizer of the
following step. So the buffers of one step lie there through every micro-step of the next, and
`zero_grad` does not free the gradients among them. `work.wait()` would.
"""

from __future__ import annotations

from collections.abc import Iterable

from snugpt.estimate.operations import FP32, INT64, Buffer
from snugpt.estimate.stacks.nanochat.parameters import (
    SMALL_ELEMENTS,
    Tensor,
    adamw_slices,
    adamw_tensors,
    muon_tensors,
    owned,
)
from snugpt.estimate.stacks.nanochat.versions import Version
from snugpt.estimate.timeline import Event
from snugpt.estimate.walk import sequence
from snugpt.spec.memory import Category
from snugpt.spec.shape import ModelShape

BF16 = 2


def fixed(name: str, category: Category, num_bytes: int, formula: str) -> Buffer:
    """A tensor whose size does not depend on the batch."""
    return Buffer(name, category, num_bytes, 0, formula)


class OptimizerStep:
    """State, held buffers and events of one version's optimizer on rank 0."""

    def __init__(
        self,
        version: Version,
        shape: ModelShape,
        world_size: int,
        *,
        communicates: bool,
        compiled: bool = True,
    ) -> None:
        self.version, self.shape, self.world_size = version, shape, world_size
        self.communicates, self.compiled = communicates, compiled
        self.adamw = adamw_tensors(version, shape)
        self.muon = muon_tensors(version, shape)
        self.gradients = {
            tensor: fixed(
                "gradients", "gradients", tensor.num_bytes,
                f"{tensor.group}: {tensor.rows}·{tensor.columns}·{tensor.element_bytes}",
            )
            for tensor in (*self.adamw, *self.muon)
        }  # fmt: skip
        self.held = tuple(self._held()) if communicates else ()

    def state(self) -> list[Buffer]:
        """What lies in memory from the second step on."""
        buffers = []
        for tensor, num_bytes in adamw_slices(self.version, self.shape, self.world_size):
            name = f"AdamW moments: {tensor.group}"
            formula = f"parameters·{tensor.element_bytes}"
            buffers += [fixed(name, "optimizer", num_bytes, formula)] * 2
            if self.version.optimizer == "lists":  # the later ones count in Python
                counter = INT64 if self.communicates else FP32
                buffers.append(fixed("AdamW counters", "optimizer", counter, "one per tensor"))
        for tensor in self.muon:
            own = owned(tensor, self.world_size)
            if self.version.optimizer == "lists":
                each = fixed("Muon momentum", "optimizer", tensor.num_bytes, "matrices·4")
                buffers += [each] * own
                continue
            size = own * tensor.num_bytes
            buffers.append(fixed("Muon momentum", "optimizer", size, "matrices·4"))
            lines = own * max(tensor.rows, tensor.columns) * FP32
            buffers.append(fixed("Muon second moments", "optimizer", lines, "longer sides·4"))
        if self.version.optimizer == "lists" and self.communicates:
            buffers += [
                fixed("zero matrices", "communication", tensor.num_bytes, "one per shape")
                for tensor in self.muon
            ]
        return buffers

    def events(self) -> list[Event]:
        """The optimizer's phase, `zero_grad` included; begins with all gradients alive."""
        if self.version.optimizer == "lists":
            events = self._lists()
        elif self.communicates:
            events = self._stacked_collectives()
        else:
            events = self._stacked_alone()
        return events + self._zero_grad()

    def all_gradients(self) -> list[Buffer]:
        """The gradients, one buffer per parameter."""
        tensors = (*self.adamw, *self.muon)
        return [self.gradients[tensor] for tensor in tensors for _ in range(tensor.count)]

    # what collectives hold

    def _held(self) -> Iterable[Buffer]:
        for tensor in self.adamw:
            for _ in range(tensor.count):
                yield self._communication("held gradients", tensor.num_bytes)
        for tensor, num_bytes in adamw_slices(self.version, self.shape, self.world_size):
            if self._scatters(tensor):
                yield self._communication("held gradient slices", num_bytes)
        for tensor in self.muon:
            padded = owned(tensor, self.world_size) * self.world_size * tensor.num_bytes
            own = owned(tensor, self.world_size) * tensor.num_bytes
            if self.version.optimizer == "lists":
                whole = tensor.count * tensor.num_bytes
                yield self._communication("held gradients", whole)
                yield self._communication("held reduce inputs", padded)
                yield self._communication("held gather outputs", padded)
                if padded > whole:
                    yield self._communication("held padding", padded - whole)
            else:
                yield self._communication("held gradient stacks", padded)
                yield self._communication("held gradient chunks", own)
                yield self._communication("held updated matrices", own)

    def _scatters(self, tensor: Tensor) -> bool:
        """Whether a tensor of AdamW goes through a reduce-scatter, which needs a slice."""
        return self.version.optimizer == "lists" or tensor.elements >= SMALL_ELEMENTS

    def _communication(self, name: str, num_bytes: int) -> Buffer:
        return fixed(name, "communication", num_bytes, "the last optimizer step's")

    # phases

    def _released(self) -> list[Event]:
        """The first collective of a step: what the last step left is dropped."""
        return [Event(-1, buffer) for buffer in self.held]

    def _lists(self) -> list[Event]:
        """October: AdamW, then Muon matrix by matrix; collectives work on lists of matrices."""
        events = self._released()
        events += self._new_held("held gradient slices")
        events += self._new_held("held reduce inputs")
        for tensor in self.muon:
            events += sequence(self._orthogonalised(tensor, 1))
        return events + self._new_held("held gather outputs") + self._new_held("held padding")

    def _stacked_alone(self) -> list[Event]:
        """One rank without NCCL. Before July each shape's stacks go before the next one's come."""
        events: list[Event] = []
        stacks = [self._stack("gradient stacks", tensor) for tensor in self.muon]
        parameters = [self._stack("matrix stacks", tensor) for tensor in self.muon]
        every = self.version.optimizer == "unified"
        if every:
            events += [Event(1, stack) for stack in stacks]
        events += self._adamw_scratch()
        for tensor, stack, parameter in zip(self.muon, stacks, parameters, strict=True):
            scratch = sequence(self._orthogonalised(tensor, tensor.count))
            if every:
                events += [Event(1, parameter), *scratch]
            else:
                events += [Event(1, stack), Event(1, parameter), *scratch]
                events += [Event(-1, stack), Event(-1, parameter)]
        if every:
            events += [Event(-1, buffer) for buffer in (*stacks, *parameters)]
        return events

    def _stacked_collectives(self) -> list[Event]:
        """Reduce all groups, then update and gather one after the other."""
        events = self._released() + self._new_held("held gradient slices")
        held = {name: iter(self._named(name)) for name in (
            "held gradient stacks", "held gradient chunks", "held updated matrices")}  # fmt: skip
        for tensor in self.muon:
            copied = self._stack("gradient stacks", tensor)
            events += [Event(1, copied), Event(1, next(held["held gradient stacks"]))]
            events += [Event(1, next(held["held gradient chunks"])), Event(-1, copied)]
        events += self._adamw_scratch()
        for tensor in self.muon:
            own = owned(tensor, self.world_size)
            parameter = self._stack("matrix stacks", tensor, own)
            updated = next(held["held updated matrices"])
            scratch = sequence(self._orthogonalised(tensor, own))
            if self.version.optimizer == "unified":
                events += [Event(1, parameter), *scratch, Event(1, updated)]
            else:
                events += [Event(1, updated), Event(1, parameter), *scratch]
            events.append(Event(-1, parameter))
        return events

    def _adamw_scratch(self) -> list[Event]:
        """Compiled, AdamW is one kernel. As it is written it holds two results at once, and since
        July bf16 tensors, their gradients and moments are cast to fp32 first."""
        if self.compiled:
            return []
        events = []
        for tensor, num_bytes in adamw_slices(self.version, self.shape, self.world_size):
            each = 2 * tensor.element_bytes
            if tensor.element_bytes == BF16 and self.version.optimizer == "unified":
                each = (2 + 4) * FP32
            size = num_bytes // tensor.element_bytes * each
            buffer = fixed("AdamW scratch", "optimizer", size, f"parameters·{each}")
            events += [Event(1, buffer), Event(-1, buffer)]
        return events

    def _zero_grad(self) -> list[Event]:
        events = [Event(-1, buffer) for buffer in self.all_gradients()]
        return events + self._new_held("held gradients")

    def _named(self, name: str) -> list[Buffer]:
        return [buffer for buffer in self.held if buffer.name == name]

    def _new_held(self, name: str) -> list[Event]:
        return [Event(1, buffer) for buffer in self._named(name)]

    def _stack(self, name: str, tensor: Tensor, count: int | None = None) -> Buffer:
        number = tensor.count if count is None else count
        size = number * tensor.num_bytes
        return fixed(name, "optimizer", size, f"{tensor.rows}·{tensor.columns}·4 each")

    def _orthogonalised(self, tensor: Tensor, count: int) -> tuple[Buffer, ...]:
        """Newton-Schulz in bf16: the matrices twice, and two squares of the shorter side.

        Without the compiler the update follows as it is written: the matrices once, the squares,
        up to four products in fp32 (before July two of them in bf16) with a mask, and a few lines
        of one number per row.
        """
        if not self.compiled:
            each, lines = (19, 5) if self.version.optimizer == "unified" else (15, 4)
            squares = 2 * count * min(tensor.rows, tensor.columns) ** 2 * BF16
            squares += lines * count * max(tensor.rows, tensor.columns) * FP32
            size = count * tensor.elements * each + squares
            whole = fixed("Muon scratch", "optimizer", size, f"matrices·{each} + 2·m·m·2 + lines")
            return whole, whole
        size = count * tensor.elements * BF16
        small = count * min(tensor.rows, tensor.columns) ** 2 * BF16
        x, following = (fixed("Muon scratch", "optimizer", size, "matrices·2") for _ in range(2))
        gram, square = (fixed("Muon scratch", "optimizer", small, "m·m·2") for _ in range(2))
        return x, gram, square, following, x, gram, square, following

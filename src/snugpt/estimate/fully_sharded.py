"""`sharding = full` as a timeline: what FSDP2 gathers, holds and lets go around each layer.

Read beside `model/fully_sharded.py` and torch/distributed/fsdp/_fully_shard. A group is a block, or
what lies outside the blocks. Its weights are gathered into one buffer and copied out of it; behind
a layer's backward its gradients are copied into one buffer, summed, and each rank keeps its rows.
The next block of backward is gathered ahead. On CUDA FSDP2 does this on streams of its own, whose
memory is not shared: hence the band (`FULL_BAND`), and no promise to the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from snugpt.estimate.operations import FP32, Buffer, Net, Weight
from snugpt.estimate.parameters import edge_weights, layer_weights
from snugpt.estimate.sharding import first_axis, row_range
from snugpt.estimate.stacks.snugpt import Part
from snugpt.estimate.timeline import Event
from snugpt.estimate.training import TrainingStep
from snugpt.estimate.updating import update
from snugpt.spec.memory import Phase


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The buffers of weights that FSDP2 gathers together."""

    flat: Buffer  # of the all-gather, until it is copied out
    gathered: tuple[Buffer, ...]
    summed: Buffer  # all gradients in fp32, for the reduce-scatter
    kept: Buffer  # this rank's rows of their sums

    @property
    def copy_out(self) -> list[Event]:
        """Copy out of what has been gathered."""
        return [*(Event(1, b) for b in self.gathered), Event(-1, self.flat)]

    @property
    def reshard(self) -> list[Event]:
        """Let the gathered weights go."""
        return [Event(-1, buffer) for buffer in self.gathered]


def group_for(net: Net, weights: Iterable[Weight], world_size: int) -> Group:
    """The buffers of one group; rows are padded to a whole number for each rank."""
    width, sizes = net.weight_bytes, []
    for weight in weights:
        rows = first_axis(weight)
        sizes.append(row_range(rows, 0, world_size)[1] * world_size * weight.elements // rows)
    elements = sum(sizes)
    return Group(
        net.fixed("all-gather buffer", "communication", elements * width, f"layer·{width}"),
        tuple(
            net.fixed("gathered weights", "weights", size * width, f"layer·{width}")
            for size in sizes
        ),
        net.fixed("reduce-scatter buffer", "communication", elements * FP32, "layer·4"),
        net.fixed("gradients", "gradients", elements * FP32 // world_size, "layer·4/GPUs"),
    )


class FullyShardedStep(TrainingStep):
    """One rank's step; see the module docstring."""

    def net_of_layers(self) -> Net:
        """Blocks are gathered in the compute dtype: nothing is cast, gradients come in it."""
        in_bf16 = self.recipe.compute_dtype == "bf16"
        return replace(self.net, weight_dtype="bf16") if in_bf16 else self.net

    def prepare(self) -> None:
        """Size the groups."""
        size, layers = self.recipe.world_size, self.net_of_layers()
        self.groups = {
            k: group_for(layers, layer_weights(self.shape, self.kinds.index(k)).values(), size)
            for k in self.layers
        }
        self.root = group_for(self.net, edge_weights(self.shape).values(), size)
        self.deferred: Buffer | None = None  # the all-gather buffer that the next one replaces
        self.waiting: Buffer | None = None  # the same of the reduce-scatter

    def enter_root(self) -> list[Event]:
        return self._gathered(self.root)

    def end_forward(self) -> list[Event]:
        last, self.deferred = self.deferred, None
        return [] if last is None else [Event(-1, last)]

    def _gathered(self, group: Group) -> list[Event]:
        """Gather a group in forward: its buffer stays until the next one's is there."""
        before = self.end_forward()
        self.deferred = group.flat
        return [Event(1, group.flat), *before, *(Event(1, b) for b in group.gathered)]

    def _place_layers(
        self,
        phase: Phase,
        segment_of: Callable[[Part, bool], list[Event]],
        *,
        reverse: bool,
        parts: dict[bool, Part] | None = None,
    ) -> None:
        """Each layer for itself, as what it lets go depends on the one before."""
        for layer, kind in enumerate(self.kinds):
            first = layer == 0 and self.embedding_keeps
            self._place(phase, layer, segment_of((parts or self.trained)[kind], first))

    def _group(self, part: Part) -> Group:
        parts = (*self.layers.items(), *self.trained.items())
        return self.groups[next(kind for kind, each in parts if each is part)]

    def _layer_forward(self, part: Part, entry_is_kept: bool) -> list[Event]:
        return self._around(part, super()._layer_forward(part, entry_is_kept))

    def _layer_evaluated(self, net: Net, part: Part, entry_is_kept: bool) -> list[Event]:
        return self._around(part, super()._layer_evaluated(net, part, entry_is_kept))

    def _around(self, part: Part, events: list[Event]) -> list[Event]:
        """Gathered before, let go behind; the caller holds what enters until the block is done."""
        group = self._group(part)
        freed = [e for e in events if e.sign < 0 and e.buffer is part.entry]
        events = [e for e in events if not (e.sign < 0 and e.buffer is part.entry)]
        return [*self._gathered(group), *events, *group.reshard, *freed]

    def place_backward(self, first: bool) -> None:
        """The layers in reverse, each with the one before it gathered ahead."""
        kinds = self.kinds
        self._place("backward", len(kinds), [Event(1, self.groups[kinds[-1]].flat)])
        for layer in reversed(range(len(kinds))):
            ahead = kinds[layer - 1] if layer else None
            group = self.groups[kinds[layer]]
            part = self.trained[kinds[layer]]
            events = [*group.copy_out]
            if ahead is not None:
                events.append(Event(1, self.groups[ahead].flat))
            events += self._layer_backward(True, part, layer == 0 and self.embedding_keeps)
            grads = [grad for op in part.operations for _, grad in op.weight_gradients]
            events += [*group.reshard, *self._summed(group, grads, first)]
            self._place("backward", layer, events)

    def _summed(self, group: Group, grads: list[Buffer], first: bool) -> list[Event]:
        """A group's gradients are summed; the buffer of the group before goes as this one comes."""
        events = [] if self.waiting is None else [Event(-1, self.waiting)]
        self.waiting = group.summed
        events += [Event(1, group.summed), *(Event(-1, grad) for grad in grads)]
        events.append(Event(1, group.kept))
        return events if first else [*events, Event(-1, group.kept)]

    def leave_root(self, first: bool) -> list[Event]:
        operations = (*self.embedding.operations, self.norm, self.loss)
        grads = {w.name: grad for op in operations for w, grad in op.weight_gradients}
        events = [*self.root.reshard, *self._summed(self.root, list(grads.values()), first)]
        self.waiting = None
        return [*events, Event(-1, self.root.summed)]

    def _updates_by_size(self) -> list[Event]:
        """As on one device, but that Muon works on whole matrices, gathered one by one."""
        events: list[Event] = []
        width = 2 if self.net.cuda else FP32
        for weights in (edge_weights(self.shape), *self._kinds_of_layers()):
            for weight in weights.values():
                if not self.updating.by_muon(weight.name):
                    continue
                elements = weight.elements
                matrix = self.net.fixed(
                    "gathered gradient", "communication", elements * width, f"matrix·{width}"
                )
                events += [Event(1, matrix), *update(self.net, weight, self.updating)]
                events.append(Event(-1, matrix))
        return events or super()._updates_by_size()

    def _kinds_of_layers(self) -> list[dict[str, Weight]]:
        return [layer_weights(self.shape, self.kinds.index(k)) for k in self.layers]

    def _release_gradients(self) -> None:
        groups = [self.root, *(self.groups[kind] for kind in self.kinds)]
        self._place("optimizer", -1, [Event(-1, group.kept) for group in groups])

    def _let_go(self, *, own: bool) -> list[Event]:
        return []

"""One training step as a timeline: what `model/step.py` does, operation by operation.

The step after the first is walked: optimizer state exists, gradients do not. Two micro-steps stand
for any number above one, because from the second on they are all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from snugpt.estimate import kinds as kind
from snugpt.estimate.compiled import compiled_layer
from snugpt.estimate.loss_scale import loss_scale, scale_of_loss
from snugpt.estimate.making_again import making_again
from snugpt.estimate.offload import MovedLayers, moved_of
from snugpt.estimate.operations import FP32, INT64, Buffer, Net, Operation, Weight
from snugpt.estimate.parameters import group_of
from snugpt.estimate.shares import Share
from snugpt.estimate.stacks import snugpt as stack
from snugpt.estimate.stacks.snugpt import Part
from snugpt.estimate.state_on_host import on_host
from snugpt.estimate.timeline import Event, Placed, Segment, Timeline
from snugpt.estimate.updating import Updating, update
from snugpt.estimate.walk import Walk, forward, recompute, sequence
from snugpt.spec.memory import Phase
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

CPU_RANDOM_STATE_BYTES = 5056  # the tensor of `torch.get_rng_state`


class TrainingStep:
    """Places the segments of one step; make one, call `timeline` once."""

    def __init__(
        self,
        shape: ModelShape,
        recipe: TrainingRecipe,
        runtime: Runtime,
        rank: int | None = None,
    ) -> None:
        self.share = Share(shape, recipe, rank)
        self.shape, self.recipe, self.block_bytes = shape, recipe, runtime.block_bytes
        self.net = Net(
            shape, runtime, recipe.compute_dtype, recipe.seq_len,
            weight_dtype=recipe.weight_dtype, fp8=recipe.fp8 == "on",
        )  # fmt: skip
        self.chunk = recipe.chunk_tokens
        self.kinds = [shape.has_value_embedding(i) for i in range(shape.num_layers)]
        net, kinds = self.net, self.kinds
        weights = self.net_of_layers()
        self.layers = {k: stack.layer_part(weights, kinds.index(k)) for k in dict.fromkeys(kinds)}
        # Only training is compiled or makes anything again; evaluation runs the layers as they are.
        compiles, again = recipe.compile == "on", recipe.selective_steps
        self.trained = {
            k: compiled_layer(net, part) if compiles else making_again(part, again)
            for k, part in self.layers.items()
        }
        self.embedding = stack.embedding_part(net)
        self.stream = net.per_token("residual stream", shape.model_dim, "C")
        self.gradient = net.gradient_of(self.stream)
        self.norm = stack.last_norm(net, self.stream)
        head = stack.head_weight(shape)
        self.loss = kind.head_loss(net, self.norm.result, head, self.chunk)
        self.embedding_keeps = any(
            self.embedding.result in op.keeps for op in self.embedding.operations
        )
        self.recomputes = recipe.checkpoint == "blocks"
        self.moved = self._moved_layers()
        self.random_states = self._random_states()
        self.updating = Updating.of(recipe)
        self.updates = (
            partial(update, self.net, updating=self.updating) if recipe.steps_in_backward else None
        )
        self.placed: list[Placed] = []
        self.moves: dict[tuple[Event, ...], Segment] = {}
        self.aliases: dict[Buffer, Buffer] = {self.embedding.result: self.stream}
        for part in self.layers.values():
            self._same_tensor(part.entry, self.stream)
            self._same_tensor(part.result, self.stream)
        self.prepare()

    def net_of_layers(self) -> Net:
        """What the sizes inside the layers depend on; another way to shard has another."""
        return self.net

    def prepare(self) -> None:
        """Make what another way to shard needs besides."""

    def enter_root(self) -> list[Event]:
        """What happens before the first operation of a forward pass."""
        return []

    def end_forward(self) -> list[Event]:
        """What happens behind the last operation of a forward pass, before the loss."""
        return []

    def leave_root(self, first: bool) -> list[Event]:
        """What happens behind the last operation of a backward pass."""
        return []

    def place_backward(self, first: bool) -> None:
        """Place the layers of the backward pass."""
        self._place_layers("backward", partial(self._layer_backward, first), reverse=True)

    def timeline(self) -> Timeline:
        """The whole step, and an evaluation batch after it."""
        total = self.net.fixed("loss", "logits", FP32, "4")
        scalars = total, *scale_of_loss(self.net)
        self._place("forward", -1, [Event(1, scalar) for scalar in scalars])
        self._micro_step(first=True)
        if self.recipe.grad_accum_steps > 1:
            self._micro_step(first=False)
        if self.share.is_part:
            self._place("clip" if self.recipe.clips else "optimizer", -1, self._let_go(own=False))
        if self.recipe.clips or self.recipe.compute_dtype == "fp16":
            self._place("clip", -1, self._clip())
        if self.updates is None:
            self._place("optimizer", -1, self._updates_by_size())
            self._release_gradients()
        last: Phase = "optimizer" if self.updates is None else "backward"
        self._place(last, -1, [Event(-1, scalar) for scalar in scalars])
        self._evaluate()
        resident = (*self.share.resident(self.net, self.updating), *loss_scale(self.net))
        abridged: set[Phase] = {"optimizer"}
        if self.chunk is not None:
            abridged |= {"loss", "evaluate"}
        return Timeline(
            resident, tuple(self.placed), self.block_bytes, self.aliases, frozenset(abridged),
            (*self.moved.on_host, *on_host(self.net, self.updating)),
        )  # fmt: skip

    def _place(self, phase: Phase, layer: int, events: list[Event]) -> None:
        if events:
            self.placed.append(Placed(phase, layer, Segment(events, self.block_bytes)))

    def _place_layers(
        self,
        phase: Phase,
        segment_of: Callable[[Part, bool], list[Event]],
        *,
        reverse: bool,
        parts: dict[bool, Part] | None = None,
    ) -> None:
        """Place one segment per layer; each kind of layer is walked once, the first on its own.

        `segment_of` is told whether the layer is the first: what enters that one may be kept by
        the embedding's norm.
        """
        made: dict[tuple[bool, bool], Segment] = {}
        layers = range(self.shape.num_layers)
        for layer in reversed(layers) if reverse else layers:
            key = self.kinds[layer], layer == 0 and self.embedding_keeps
            if key not in made:
                events = segment_of((parts or self.trained)[key[0]], key[1])
                made[key] = Segment(events, self.block_bytes)
            self._place_moved(phase, layer, self.moved.before(phase, layer))
            self.placed.append(Placed(phase, layer, made[key]))
            self._place_moved(phase, layer, self.moved.after(phase, layer))

    def _place_moved(self, phase: Phase, layer: int, events: tuple[Event, ...]) -> None:
        """Layers of one kind move the same: their segment is made once."""
        if events:
            if events not in self.moves:
                self.moves[events] = Segment(events, self.block_bytes)
            self.placed.append(Placed(phase, layer, self.moves[events]))

    def _moved_layers(self) -> MovedLayers:
        """What `offload = activations` moves of each layer but the last."""
        if self.recipe.offload != "activations":
            return MovedLayers()
        return MovedLayers(
            tuple(
                moved_of(
                    self.trained[mixes], recomputes=self.recomputes,
                    entry_stays=layer == 0 and self.embedding_keeps,
                )
                for layer, mixes in enumerate(self.kinds[:-1])
            )
        )  # fmt: skip

    def _random_states(self) -> tuple[Buffer, ...]:
        """What a checkpointed layer keeps to drop the same again, and the current one put aside
        meanwhile (torch.utils.checkpoint). They lie in host memory whatever the device is."""
        if not self.recomputes or not self.net.dropout or self.net.cuda:
            return ()
        size = CPU_RANDOM_STATE_BYTES
        return tuple(
            self.net.fixed("random states", "activations", size, f"{size} per layer")
            for _ in range(2)
        )

    def _layer_forward(self, part: Part, entry_is_kept: bool) -> list[Event]:
        hold = self.recomputes or entry_is_kept
        events = forward(
            part.operations, part.entry, keep=not self.recomputes, made_again=part.made_again,
            hold_entry=hold,
        )  # fmt: skip
        return [*(Event(1, state) for state in self.random_states[:1]), *events]

    def _micro_step(self, *, first: bool) -> None:
        batch = self._batch_ids()
        last = self.shape.num_layers
        self._place("forward", -1, [*sequence(batch), *self.enter_root()])
        self._place("forward", -1, forward(self.embedding.operations, None, keep=True))
        self._place_layers("forward", self._layer_forward, reverse=False)
        norm = forward([self.norm], self.stream, keep=True)
        self._place("forward", last, [*norm, *self.end_forward()])
        h = self.norm.result
        held = h in self.norm.keeps
        self._place("loss", last, forward([self.loss], h, keep=True, hold_entry=held))
        self._backward(first=first)
        self._place("backward", -1, [*(Event(-1, b) for b in batch), Event(-1, self.loss.result)])

    def _batch_ids(self) -> tuple[Buffer, ...]:
        return tuple(
            self.net.per_token(name, 1, "", element_bytes=INT64, category="batch")
            for name in ("tokens", "targets")
        )

    def _backward(self, *, first: bool) -> None:
        tied = {"embedding": 2} if self.shape.tied_embeddings else {}
        walk = Walk(first or self.recipe.sharding == "full", tied, self.updates)
        # The gradient of the loss itself, 1: the caller holds it until all of backward is done.
        root = self.net.fixed("loss", "logits", FP32, "4")
        events, left = walk.backward([self.norm, self.loss], self.stream, root, incoming_stays=True)
        self._place("backward", self.shape.num_layers, [Event(1, root), *events])
        self._same_tensor(left, self.gradient)
        self.place_backward(first)
        events, _ = walk.backward(self.embedding.operations, None, self.gradient)
        self._place("backward", -1, [*events, *self.leave_root(first), Event(-1, root)])

    def _layer_backward(self, first: bool, part: Part, entry_is_kept: bool) -> list[Event]:
        assert part.entry is not None
        events = sequence(self.random_states[1:])
        events += recompute(part.operations, part.entry) if self.recomputes else []
        events += [Event(-1, state) for state in self.random_states[1:]]
        hold = self.recomputes and not entry_is_kept
        backward, left = Walk(first, update=self.updates).backward(
            part.operations, part.entry, self.gradient, made_again=part.made_again,
            beside=self.random_states[:1], hold_entry=hold, entry_stays=entry_is_kept,
        )  # fmt: skip
        self._same_tensor(left, self.gradient)
        return [*events, *backward]

    def _same_tensor(self, name: Buffer | None, tensor: Buffer) -> None:
        if name is not None and name is not tensor:
            self.aliases[name] = tensor

    def _clip(self) -> list[Event]:
        """`clip_grad_norm_`: one norm per parameter tensor, and all of them stacked."""
        num_tensors = self.share.num_tensors
        each = self.net.fixed("gradient norms", "gradients", FP32, "4 per parameter tensor")
        stacked = self.net.fixed("gradient norms", "gradients", num_tensors * FP32, "tensors·4")
        total = self.net.fixed("gradient norms", "gradients", FP32, "4")
        norms = [Event(1, each)] * num_tensors
        return [
            *norms, Event(1, stacked), Event(1, total), Event(-1, stacked),
            *(Event(-1, norm) for _, norm in norms), Event(-1, total),
        ]  # fmt: skip

    def _updates_by_size(self) -> list[Event]:
        """The update of one parameter of each size: what the others of that size take again."""
        sizes = {(group_of(w.name), w.rows, w.columns): w for w in self.share.some_weights()}
        weights = (weight for _, weight in sorted(sizes.items()))
        return [e for w in weights for e in update(self.net, w, self.updating, abridged=True)]

    def _release_gradients(self) -> None:
        """`zero_grad(set_to_none=True)`: the gradients that backward left behind."""
        edges = ((self.norm, self.loss), self.embedding.operations)
        seen: set[str] = set()
        if self.share.is_part:
            self._place("optimizer", -1, self._let_go(own=True))
            return
        for operations in edges:
            events = []
            for weight, buffer in _weight_gradients(operations):
                if weight.name not in seen:
                    seen.add(weight.name)
                    events.append(Event(-1, buffer))
            self._place("optimizer", -1, events)
        self._place_layers("optimizer", _released, reverse=True)

    def _let_go(self, *, own: bool) -> list[Event]:
        """The gradients of which this rank owns something, or of which it owns nothing."""
        return [
            Event(-1, grad) for name, grad in self._gradients() if (name in self.share.owns) == own
        ]

    def _gradients(self) -> Iterator[tuple[str, Buffer]]:
        """Every weight by its name in the model, and the gradient that backward left of it."""
        yield from {
            weight.name: grad
            for operations in (self.embedding.operations, (self.norm, self.loss))
            for weight, grad in _weight_gradients(operations)
        }.items()
        for layer, mixes in enumerate(self.kinds):
            for weight, grad in _weight_gradients(self.trained[mixes].operations):
                yield f"blocks.{layer}.{weight.name}", grad

    def _evaluate(self) -> None:
        """`model.step.evaluate_batch` with the training's device batch, without gradients."""
        net = replace(self.net, drops=False, fp8=False)
        batch, last = self._batch_ids(), self.shape.num_layers
        self._place("evaluate", -1, [*sequence(batch), *self.enter_root()])
        embedding = stack.embedding_part(net)
        self._place("evaluate", -1, forward(embedding.operations, None, keep=False))
        self._same_tensor(embedding.result, self.stream)
        evaluated = partial(self._layer_evaluated, net)
        self._place_layers("evaluate", evaluated, reverse=False, parts=self.layers)
        norm = forward([self.norm], self.stream, keep=False)
        self._place("evaluate", last, [*norm, *self.end_forward()])
        losses = kind.token_losses(net, self.norm.result, self.chunk)
        events = forward([losses], self.norm.result, keep=False)
        self._place("evaluate", last, [*events, Event(-1, losses.result)])
        self._place("evaluate", -1, [Event(-1, b) for b in batch])

    def _layer_evaluated(self, net: Net, part: Part, entry_is_kept: bool) -> list[Event]:
        layer = self.kinds.index(next(k for k, p in self.layers.items() if p is part))
        changes = net.shape.dropout or self.net.fp8
        quiet = stack.layer_part(net, layer) if changes else part
        self._same_tensor(quiet.entry, self.stream)
        self._same_tensor(quiet.result, self.stream)
        return forward(quiet.operations, quiet.entry, keep=False)


def _released(part: Part, entry_is_kept: bool) -> list[Event]:
    return [Event(-1, buffer) for _, buffer in _weight_gradients(part.operations)]


def _weight_gradients(operations: tuple[Operation, ...]) -> list[tuple[Weight, Buffer]]:
    return [pair for op in operations for pair in op.weight_gradients]

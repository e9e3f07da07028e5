"""nanochat's training step as a timeline: compiled forward and backward, optimizer, validation.

The step after the first is walked: optimizer state is there, and what collectives still hold of the
step before. Two micro-steps stand for any number above one. What the compiled graphs keep is
`kept.py`'s table; what backward makes meanwhile (gradients of one layer at a time, every weight's
gradient in fp32) follows from its operations. The metric of its CORE tasks and its samples run
eager on single prompts and are left out.
"""

from __future__ import annotations

from collections.abc import Callable

from snugpt.estimate import scratch
from snugpt.estimate.operations import FP32, INT64, Buffer
from snugpt.estimate.stacks.nanochat.kept import Kept, kept_at_edges, kept_by_layer, logits_bytes
from snugpt.estimate.stacks.nanochat.optimizer import BF16, OptimizerStep, fixed
from snugpt.estimate.stacks.nanochat.parameters import Tensor, all_tensors
from snugpt.estimate.stacks.nanochat.versions import Version
from snugpt.estimate.timeline import Event, Placed, Segment, Timeline
from snugpt.spec.memory import Category, Phase
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

ROTARY_CONTEXTS = 10  # its rotary tables reach ten times as far as the context
HANDLES = 2  # cuBLAS: one for the main thread, one for autograd's, each with its workspace
MLP_WIDTHS = 4


class NanochatStep:
    """Places the segments of one step; make one, call `timeline` once."""

    def __init__(
        self, version: Version, shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime
    ) -> None:
        self.version, self.shape, self.recipe, self.runtime = version, shape, recipe, runtime
        self.fp8 = recipe.fp8 == "on"
        self.optimizer = OptimizerStep(
            version, shape, recipe.world_size,
            communicates=version.communicates(recipe.launcher, recipe.world_size),
            compiled=recipe.compile == "on",
        )  # fmt: skip
        self.placed: list[Placed] = []
        self.segments: dict[tuple[Phase, bool, bool], Segment] = {}
        self.kept = {kept: self._kept(kept) for kept in (*self._layer_table(), *self._edge_table())}
        self.stream_gradient = self._tokens("activation gradients", 2 * shape.model_dim, "C·2")
        self.wide_gradient = self._tokens(
            "activation gradients", 2 * MLP_WIDTHS * shape.model_dim, "4·C·2"
        )
        self.casts = {layer: self._layer_casts(layer) for layer in (True, False)}
        V, C = shape.padded_vocab_size, shape.model_dim
        self.head_cast = fixed("weight casts", "activations", V * C * BF16, "V·C·2")
        self.logits = [
            self._tokens(name, size * V, f"V·{size}", "logits")
            for name, size in logits_bytes(self.fp8).items()
        ]
        self.loss = fixed("loss", "logits", FP32, "4")

    def timeline(self) -> Timeline:
        """The whole step, and a validation batch after it."""
        self._micro_step(first=True)
        if self.recipe.grad_accum_steps > 1:
            self._micro_step(first=False)
        if self.version.clips:
            self._clip()
        self._place("optimizer", -1, self.optimizer.events())
        self._validate()
        return Timeline(self._resident(), tuple(self.placed), self.runtime.block_bytes)

    # what is there between steps

    def _resident(self) -> tuple[Buffer, ...]:
        shape, context = self.shape, self.shape.context_len
        buffers = []
        for tensor in all_tensors(self.version, shape):
            weight = fixed(
                f"weights: {tensor.group}", "weights", tensor.num_bytes,
                f"parameters·{tensor.element_bytes}",
            )  # fmt: skip
            buffers += [weight] * tensor.count
        size = ROTARY_CONTEXTS * context * (shape.head_dim // 2) * BF16
        buffers += [fixed("rotary tables", "weights", size, "10·context·D/2 each")] * 2
        buffers.append(fixed("bytes per token", "batch", shape.vocab_size * FP32, "V·4"))
        buffers += self.optimizer.state()
        buffers += self.optimizer.held
        buffers += self._batches()
        space = scratch.cublas_workspace(self.runtime.capability)
        workspace = fixed("cuBLAS workspace", "workspace", space, "constant of the card")
        buffers += [workspace] * HANDLES
        return tuple(buffers)

    def _batches(self) -> list[Buffer]:
        """Token ids of training, and those of the last validation, whose loader stays alive."""
        if self.version.optimizer == "lists":  # October: inputs int32, targets int64
            inputs = self._tokens("token ids", FP32, "4", "batch")
            return [inputs, self._tokens("token ids", INT64, "8", "batch")] * 2
        return [self._tokens("token ids", 2 * INT64, "16", "batch")] * 2

    # one micro-step

    def _micro_step(self, *, first: bool) -> None:
        last = self.shape.num_layers
        edges = [self.kept[kept] for kept in self._edge_table()]
        self._place_layers("forward", self._layer_forward, range(last))
        self._place("forward", last, [Event(1, edge) for edge in edges])
        self._place("loss", last, self._loss_forward())
        self._place("backward", last, self._head_backward(edges))
        self._place_layers("backward", self._layer_backward, range(last - 1, -1, -1))
        self._place("backward", -1, self._embedding_backward(first=first))

    def _layer_table(self) -> tuple[Kept, ...]:
        return kept_by_layer(self.version, self.fp8)

    def _edge_table(self) -> tuple[Kept, ...]:
        return kept_at_edges(self.version, self.fp8)

    def _loss_forward(self) -> list[Event]:
        head = [] if self.fp8 else [Event(1, self.head_cast)]
        return [*head, Event(1, self.logits[0]), Event(1, self.loss)]

    def _layer_forward(self, layer: int) -> list[Event]:
        passing = self._tokens("sublayer outputs", 2 * self.shape.model_dim, "C·2")
        events = [Event(1, buffer) for buffer in self._casts(layer)]
        events += [Event(1, buffer) for buffer in self._kept_in(layer)]
        return [*events, Event(1, passing), Event(-1, passing)]

    def _head_backward(self, edges: list[Buffer]) -> list[Event]:
        """The gradient of the head, then of its input; the logits go after both."""
        head = self._one("head")
        product = fixed("gradients in bf16", "gradients", head.elements * BF16, "V·C·2")
        wide = self.logits[1:]
        events = [Event(1, buffer) for buffer in wide]
        if self.fp8:  # the fp32 gradient and the logits end where their FP8 copies exist
            events += [Event(-1, self.logits[0]), Event(-1, wide[0])]
        events.append(Event(1, product))
        normed = [edge for edge in edges if edge.name == "norm outputs"]
        events += [Event(-1, edge) for edge in normed]
        events.append(Event(1, self.stream_gradient))
        if self.fp8:
            events.append(Event(-1, wide[1]))
        else:
            events += [Event(-1, self.logits[0]), Event(-1, self.head_cast)]
        events += [Event(1, self.optimizer.gradients[head]), Event(-1, product)]
        return events + [Event(-1, e) for e in edges if e not in normed and e.name != "embeddings"]

    def _layer_backward(self, layer: int) -> list[Event]:
        """MLP, then attention: gradients of activations come and go, those of weights stay."""
        C = self.shape.model_dim
        kept = self._kept_in(layer)
        wide, narrow = self.wide_gradient, self.stream_gradient
        names = ("mlp activations", "mlp inputs")
        mlp = [buffer for buffer in kept if buffer.name in names]
        events = [Event(1, wide), *self._weight_gradients([(C, 4 * C)])]
        events += [Event(-1, buffer) for buffer in mlp]
        events += [*self._weight_gradients([(4 * C, C)]), Event(1, narrow), Event(-1, wide)]
        events.append(Event(-1, narrow))
        parts = [narrow] * 4  # of the attention's output, queries, keys and values
        events += [Event(1, part) for part in parts]
        events += [Event(-1, buffer) for buffer in kept if buffer not in mlp]
        events += self._weight_gradients([(C, C)] * 4)
        events += [Event(-1, part) for part in parts]
        if self.shape.has_value_embedding(layer):
            gate = (self.shape.num_kv_heads, self.version.gate_channels)
            events += self._weight_gradients([gate])
            events += self._table_gradient("value_embedding")
        return events + [Event(-1, buffer) for buffer in self._casts(layer)]

    def _weight_gradients(self, sizes: list[tuple[int, int]]) -> list[Event]:
        """Each product is bf16, cast to fp32 at once."""
        events = []
        for rows, columns in sizes:
            tensor = next(t for t in self.optimizer.muon if (t.rows, t.columns) == (rows, columns))
            product = fixed("gradients in bf16", "gradients", tensor.elements * BF16, "weight·2")
            events += [Event(1, product), Event(1, self.optimizer.gradients[tensor])]
            events.append(Event(-1, product))
        return events

    def _table_gradient(self, group: str) -> list[Event]:
        """A dense gradient of an embedding: summed in fp32, then cast to bf16."""
        tensor = self._one(group)
        summed = fixed("gradients in fp32", "gradients", tensor.elements * FP32, "V·C·4")
        return [Event(1, summed), Event(1, self.optimizer.gradients[tensor]), Event(-1, summed)]

    def _embedding_backward(self, *, first: bool) -> list[Event]:
        """The end of a micro-step. A compiled backward hands out all its gradients together, so
        from the second micro-step on they lie beside those they are added to."""
        events = [
            Event(-1, self.kept[kept]) for kept in self._edge_table() if kept.name == "embeddings"
        ]
        events += self._table_gradient("embedding")
        scalars = [t for t in self.optimizer.adamw if t.group == "scalars"]
        events += [Event(1, self.optimizer.gradients[t]) for t in scalars for _ in range(t.count)]
        events += [Event(-1, self.stream_gradient), Event(-1, self.loss)]
        if not first:
            events += [Event(-1, buffer) for buffer in self.optimizer.all_gradients()]
        return events

    # the rest of the step

    def _clip(self) -> None:
        number = len(self.optimizer.all_gradients())
        norms = fixed("gradient norms", "workspace", number * FP32, "4 per parameter tensor")
        self._place("clip", -1, [Event(1, norms), Event(-1, norms)])

    def _validate(self) -> None:
        """Without gradients, in bf16 also under FP8: one layer's tensors, then the logits."""
        C, V = self.shape.model_dim, self.shape.padded_vocab_size
        stream = self._tokens("residual stream", 2 * C, "C·2")
        normed = self._tokens("norm outputs", 2 * C, "C·2")
        wide = self._tokens("mlp inputs", 2 * MLP_WIDTHS * C, "4·C·2")
        cast = fixed("weight casts", "activations", 4 * C * C * BF16, "4·C·C·2")
        logits = self._tokens("logits", 2 * V, "V·2", "logits")
        losses = self._tokens("token losses", FP32, "4", "logits")
        layer = [Event(1, normed), Event(1, cast), Event(1, wide)]
        layer += [Event(-1, each) for each in (normed, wide, cast)]
        self._place("evaluate", -1, [Event(1, stream)])
        self._place_layers("evaluate", lambda _: layer, range(self.shape.num_layers))
        end = [Event(1, normed), Event(-1, stream), Event(1, self.head_cast), Event(1, logits)]
        end += [Event(-1, normed), Event(-1, self.head_cast), Event(1, losses)]
        self._place("evaluate", self.shape.num_layers, [*end, Event(-1, logits), Event(-1, losses)])

    # buffers

    def _place(self, phase: Phase, layer: int, events: list[Event]) -> None:
        if events:
            self.placed.append(Placed(phase, layer, Segment(events, self.runtime.block_bytes)))

    def _place_layers(
        self, phase: Phase, segment_of: Callable[[int], list[Event]], layers: range
    ) -> None:
        """Place one segment per layer; each kind of layer is walked once, the first on its own."""
        for layer in layers:
            key = phase, self.shape.has_value_embedding(layer), layer == 0
            made = self.segments.get(key)
            if made is None:
                made = Segment(segment_of(layer), self.runtime.block_bytes)
                self.segments[key] = made
            self.placed.append(Placed(phase, layer, made))

    def _tokens(
        self, name: str, token_bytes: int, text: str, category: Category = "activations"
    ) -> Buffer:
        return Buffer(name, category, 0, self.recipe.seq_len * token_bytes, f"B·T·{text}")

    def _kept(self, kept: Kept) -> Buffer:
        shape = self.shape
        size = kept.per_channel * shape.model_dim + kept.per_head * shape.num_heads + kept.per_token
        words = ((kept.per_channel, "C·"), (kept.per_head, "H·"), (kept.per_token, ""))
        return self._tokens(kept.name, size, " + ".join(f"{w}{n}" for n, w in words if n))

    def _kept_in(self, layer: int) -> list[Buffer]:
        mixing = self.shape.has_value_embedding(layer)
        wanted = {"every", "mixing" if mixing else "plain"} | ({"not first"} if layer else set())
        return [self.kept[kept] for kept in self._layer_table() if kept.where in wanted]

    def _casts(self, layer: int) -> list[Buffer]:
        return self.casts[self.shape.has_value_embedding(layer)]

    def _layer_casts(self, mixing: bool) -> list[Buffer]:
        """A layer's weights in bf16, kept from forward to backward. In FP8 they are made again."""
        if self.fp8:
            return []
        C = self.shape.model_dim
        sizes = [C * C] * 4 + [4 * C * C] * 2
        if mixing:
            sizes.append(self.shape.num_kv_heads * self.version.gate_channels)
        return [
            fixed("weight casts", "activations", size * BF16, f"weight·{BF16}") for size in sizes
        ]

    def _one(self, group: str) -> Tensor:
        return next(tensor for tensor in self.optimizer.adamw if tensor.group == group)

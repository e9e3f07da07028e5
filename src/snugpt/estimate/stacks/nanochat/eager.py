"""nanochat's step without its compiler (`TORCHDYNAMO_DISABLE=1`), from 14 March 2026 on.

Earlier versions run under autocast, which keeps copies of its own; they are not derived. Each
operation allocates its result. What autograd saves is `kept.py`'s table; here stand the crests: the
loss holds three to four fp32 copies of the logits, a layer's backward its activations' gradients.
"""

from __future__ import annotations

from collections.abc import Callable

from snugpt.estimate import scratch
from snugpt.estimate.operations import FP32, Buffer
from snugpt.estimate.stacks.nanochat.kept import EAGER_EDGES, EAGER_EDGES_SHALLOW, EAGER_LAYER, Kept
from snugpt.estimate.stacks.nanochat.optimizer import BF16, fixed
from snugpt.estimate.stacks.nanochat.step import NanochatStep
from snugpt.estimate.stacks.nanochat.versions import Version
from snugpt.estimate.timeline import Event
from snugpt.estimate.walk import sequence
from snugpt.spec.memory import Phase
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape


class EagerStep(NanochatStep):
    """The same step, operation by operation."""

    first = True

    def __init__(
        self, version: Version, shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime
    ) -> None:
        super().__init__(version, shape, recipe, runtime)
        size = recipe.seq_len * (shape.head_dim // 2) * BF16
        # the sines with their sign turned, of queries and of keys
        self.signs = [fixed("rotary signs", "activations", size, "T·D/2·2")] * 2
        narrow = fixed("random state", "activations", 1, "one block each")
        self.states = [narrow, narrow]  # that flash attention hands on to its backward
        self.tanh, self.log_softmax = self._wide("tanh of logits"), self._wide("log-softmax")
        casts = version.smear_channels * BF16, BF16, BF16  # smear gate, smear and backout factors
        self.scalars = [
            fixed("weight casts", "activations", each, "24·2, 2 and 2") for each in casts
        ]

    def _layer_table(self) -> tuple[Kept, ...]:
        return EAGER_LAYER

    def _edge_table(self) -> tuple[Kept, ...]:
        shallow = self.shape.num_layers // 2 == self.shape.num_layers - 1
        return EAGER_EDGES + EAGER_EDGES_SHALLOW if shallow else EAGER_EDGES

    def _micro_step(self, *, first: bool) -> None:
        if self.first != first:
            self.first = first
            self.segments = {
                key: made for key, made in self.segments.items() if key[0] != "backward"
            }
        super()._micro_step(first=first)

    def _layer_forward(self, layer: int) -> list[Event]:
        """What stays, and at the end the MLP: input, ReLU and square are alive together."""
        kept = self._kept_in(layer)
        passing = self._tokens("mlp inputs", 8 * self.shape.model_dim, "C·8")
        signs = [Event(1, each) for each in (*self.signs, *self.states)]
        events = [Event(1, buffer) for buffer in (*self._casts(layer), *kept)]
        return [*signs, *events, Event(1, passing), Event(-1, passing)]

    def _loss_forward(self) -> list[Event]:
        """bf16 logits, then fp32: cast, divided, tanh, times 15, log-softmax."""
        V = self.shape.padded_vocab_size
        narrow = self._tokens("logits", BF16 * V, "V·2", "logits")
        cast, ratio, capped = (self._wide("logits in fp32") for _ in range(3))
        return [
            *(Event(1, each) for each in (*self.scalars, self.head_cast, narrow, cast)),
            Event(-1, narrow),
            Event(1, ratio), Event(1, self.tanh), Event(-1, ratio), Event(1, capped),
            Event(-1, cast), Event(1, self.log_softmax), Event(1, self.loss),
            Event(1, self.loss), Event(-1, capped),  # the loss, and how many tokens it counts
        ]  # fmt: skip

    def _wide(self, name: str) -> Buffer:
        return self._tokens(name, FP32 * self.shape.vocab_size, "V·4", "logits")

    def _head_backward(self, edges: list[Buffer]) -> list[Event]:
        of_loss, of_softmax, of_cap, of_tanh, of_ratio = (
            self._wide("logit gradients") for _ in range(5)
        )
        V = self.shape.padded_vocab_size
        narrow = self._tokens("logit gradients", BF16 * V, "V·2", "logits")
        head = self._one("head")
        product = fixed("gradients in bf16", "gradients", head.elements * BF16, "V·C·2")
        stays = [edge for edge in edges if edge.name in ("embeddings", "smear gate")]
        events = [
            Event(1, self.loss), Event(1, of_loss), Event(1, of_softmax), Event(-1, of_loss),
            Event(-1, self.log_softmax), Event(1, of_cap), Event(-1, of_softmax),
            Event(1, of_tanh), Event(-1, of_cap),
            Event(-1, self.tanh), Event(1, of_ratio), Event(-1, of_tanh), Event(1, narrow),
            Event(-1, of_ratio), Event(1, product), Event(1, self.stream_gradient),
            Event(-1, narrow), Event(-1, self.head_cast),
        ]  # fmt: skip
        events += self._given(self.optimizer.gradients[head], product)
        events += [Event(-1, edge) for edge in edges if edge not in stays]
        return [*events, Event(1, self.stream_gradient)]  # for the middle layer

    def _given(self, gradient: Buffer, product: Buffer) -> list[Event]:
        """A gradient reaches its parameter at once: taken over, or added and freed."""
        events = [Event(1, gradient), Event(-1, product)]
        return events if self.first else [*events, Event(-1, gradient)]

    def _weight_gradients(self, sizes: list[tuple[int, int]]) -> list[Event]:
        events = []
        for rows, columns in sizes:
            tensor = next(t for t in self.optimizer.muon if (t.rows, t.columns) == (rows, columns))
            product = fixed("gradients in bf16", "gradients", tensor.elements * BF16, "weight·2")
            events += [Event(1, product), *self._given(self.optimizer.gradients[tensor], product)]
        return events

    def _table_gradient(self, group: str) -> list[Event]:
        """CUDA's kernel writes the dense gradient in bf16 at once."""
        gradient = self.optimizer.gradients[self._one(group)]
        events = [Event(1, gradient)]
        return events if self.first else [*events, Event(-1, gradient)]

    def _layer_backward(self, layer: int) -> list[Event]:
        """The MLP, then attention. A weight's cast goes once it was multiplied with."""
        C, kept, casts = self.shape.model_dim, self._kept_in(layer), self._casts(layer)
        narrow, wide = self.stream_gradient, self.wide_gradient
        inputs, output, up, down, *gate = casts[:3], casts[3], casts[4], casts[5], *casts[6:]
        relu = next(b for b in kept if b.name == "mlp activations")  # and its square
        events = [Event(1, wide), Event(-1, down), Event(-1, relu)]
        events += self._weight_gradients([(C, 4 * C)])
        events += [Event(1, wide)] * 3 + [Event(-1, wide)] * 3  # of the square
        events += [Event(1, wide), Event(-1, wide), Event(-1, relu), Event(1, narrow)]
        events += [Event(-1, wide), Event(-1, up), *self._weight_gradients([(4 * C, C)])]
        events += [Event(1, narrow), Event(-1, narrow), Event(-1, output)]
        events += self._weight_gradients([(C, C)])
        events += [*[Event(1, narrow)] * 3, *sequence(self._inside_attention() * 2)]
        events += [Event(-1, buffer) for buffer in kept if buffer is not relu]
        events += [Event(-1, each) for each in (*self.signs, *self.states)]
        events += [Event(-1, narrow), *self._weight_gradients([(C, C)] * 3)]
        events += [Event(-1, cast) for cast in inputs]
        if gate:
            sizes = (self.shape.num_kv_heads, self.version.gate_channels)
            events += [*self._weight_gradients([sizes]), Event(-1, gate[0])]
            events += self._table_gradient("value_embedding")
        return events + [Event(-1, narrow)] * 3

    def _inside_attention(self) -> tuple[Buffer, ...]:
        H, D = self.shape.num_heads, self.shape.head_dim
        sizes = scratch.flash_backward(self.recipe.seq_len, H, H, D, BF16)
        said = "FlashAttention-2's backward"
        return tuple(Buffer("inside attention", "workspace", 0, size, said) for size in sizes)

    def _place_layers(
        self, phase: Phase, segment_of: Callable[[int], list[Event]], layers: range
    ) -> None:
        """Two gradients wait: the middle layer's, whose output was taken out at the end, and that
        of the first layer's input, which every layer adds to."""
        last, middle = self.shape.num_layers - 1, self.shape.num_layers // 2
        if phase != "backward":
            super()._place_layers(phase, segment_of, layers)
            return
        for layer in layers:
            if layer == middle:
                self._place(phase, layer, [Event(-1, self.stream_gradient)])
            super()._place_layers(phase, segment_of, range(layer, layer - 1, -1))
            if layer == last:
                self._place(phase, layer, [Event(1, self.stream_gradient)])

    def _embedding_backward(self, *, first: bool) -> list[Event]:
        stays = ("embeddings", "smear gate")
        events = [Event(-1, self.kept[kept]) for kept in self._edge_table() if kept.name in stays]
        events += self._table_gradient("embedding")
        for tensor in self.optimizer.adamw:
            if tensor.group == "scalars":
                gradient = self.optimizer.gradients[tensor]
                for _ in range(tensor.count):
                    events += [Event(1, gradient)] if first else []
        return [*events, Event(-1, self.stream_gradient), Event(-1, self.stream_gradient),
                Event(-1, self.loss), Event(-1, self.loss), Event(-1, self.loss),
                *(Event(-1, each) for each in self.scalars)]  # fmt: skip

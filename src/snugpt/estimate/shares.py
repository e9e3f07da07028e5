"""What one device's optimizers update: every weight, or this rank's pieces of them.

Read beside `model/ranks.py`. Sums and copies between ranks are made in place; what NCCL or gloo
take for themselves is outside PyTorch's allocator (`estimate/process.py` has a band for it).
"""

from __future__ import annotations

from snugpt.estimate.operations import FP32, Buffer, Net, Weight
from snugpt.estimate.parameters import (
    all_weights,
    edge_weights,
    group_of,
    layer_kinds,
    layer_weights,
)
from snugpt.estimate.sharding import heaviest_rank, pieces_of
from snugpt.estimate.stacks import snugpt as stack
from snugpt.estimate.updating import Updating, optimizer_state
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import ModelShape


class Share:
    """One rank's share of a model in training, by default of the rank that has the most state."""

    def __init__(self, shape: ModelShape, recipe: TrainingRecipe, rank: int | None = None) -> None:
        self.shape, self.is_part = shape, recipe.sharding != "none"
        self.has_all_weights = recipe.sharding != "full"
        self.owns: frozenset[str] = frozenset()  # names of the weights of which it has some rows
        self.pieces: list[Weight] = []
        if self.is_part:
            rank = heaviest_rank(shape, recipe) if rank is None else rank
            own = [piece for piece in pieces_of(shape, recipe) if piece.owner == rank]
            self.owns = frozenset(piece.weight for piece in own)
            self.pieces = [
                Weight(p.weight.rpartition(".")[2], p.end - p.begin, p.columns) for p in own
            ]

    @property
    def num_tensors(self) -> int:
        """How many tensors its optimizers update."""
        return len(self.owns) if self.is_part else sum(1 for _ in all_weights(self.shape))

    def resident(self, net: Net, updating: Updating) -> tuple[Buffer, ...]:
        """What lies in memory between steps: all weights, and the optimizer state of its own."""
        everything = stack.resident(net, updating)
        if not self.is_part:
            return everything
        state = [b for weight in self.pieces for b in optimizer_state(net, weight, updating)]
        rest = [b for b in everything if b.category != "optimizer"]
        if self.has_all_weights:
            return (*rest, *state)
        rows = [
            net.fixed(f"weights: {group_of(w.name)}", "weights", w.elements * FP32, "parameters·4")
            for w in self.pieces
        ]
        return (*rows, *(b for b in rest if not b.name.startswith("weights: ")), *state)

    def some_weights(self) -> list[Weight]:
        """What it updates, at least one of every size."""
        if self.is_part:
            return self.pieces
        layers = [layer_weights(self.shape, layer) for layer in layer_kinds(self.shape)]
        return [w for weights in (edge_weights(self.shape), *layers) for w in weights.values()]

"""What one rank of several keeps and does otherwise than a device alone: resident, clip, update.

Read beside `model/ranks.py`. Sums and copies between ranks are made in place; what NCCL or gloo
take for themselves is outside PyTorch's allocator (`estimate/process.py` has a band for it).
"""

from __future__ import annotations

from dataclasses import dataclass

from snugpt.estimate.operations import Buffer, Net, Weight
from snugpt.estimate.parameters import group_of
from snugpt.estimate.sharding import Piece, heaviest_rank, pieces_of
from snugpt.estimate.stacks import snugpt as stack
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Share:
    """The pieces that one rank's optimizers update."""

    pieces: tuple[Piece, ...]
    owns: frozenset[str]  # names of the weights of which some rows are its own

    def resident(self, net: Net, recipe: TrainingRecipe) -> tuple[Buffer, ...]:
        """What lies in memory between steps: all weights, the optimizer state of the pieces."""
        everything = stack.resident(net, recipe.optimizer)
        state = [
            buffer
            for piece in self.pieces
            for buffer in stack.optimizer_state(net, weight_of(piece), recipe.optimizer)
        ]
        return (*(b for b in everything if b.category != "optimizer"), *state)

    def matrices(self) -> set[tuple[int, int]]:
        """Rows and columns of the matrices that Muon updates here."""
        return {
            (piece.rows, piece.columns)
            for piece in self.pieces
            if group_of(_leaf(piece)) == "matrices"
        }


def share_of(shape: ModelShape, recipe: TrainingRecipe, rank: int | None = None) -> Share:
    """Return one rank's share, by default of the rank that has the most state."""
    rank = heaviest_rank(shape, recipe) if rank is None else rank
    everybodys = recipe.sharding == "none"
    own = tuple(p for p in pieces_of(shape, recipe) if everybodys or p.owner == rank)
    return Share(own, frozenset(piece.weight for piece in own))


def weight_of(piece: Piece) -> Weight:
    """A piece as a weight of its own."""
    return Weight(_leaf(piece), piece.end - piece.begin, piece.columns)


def _leaf(piece: Piece) -> str:
    return piece.weight.rpartition(".")[2]

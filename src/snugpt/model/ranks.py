"""Ranks: what the processes of one run do together, one device each.

A step on one device calls the same four methods, which then do nothing beside it:

    parameters   what this rank's optimizers own: whole weights, or rows of them
    reduce       gradients become sums over all ranks, at their owners
    clip         by the norm of all gradients
    spread       weights go from their owners to everybody

Sums and copies are made in place, so they take no memory of PyTorch's. Each rank's loss is divided
by the tokens of all, so that sums are means. Which rows are whose says `estimate/sharding.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from snugpt.estimate.sharding import Piece, pieces_of
from snugpt.spec.recipe import TrainingRecipe


class Alone:
    """One process: all weights are its own."""

    rank, size = 0, 1
    cuts_state = False  # whether no rank has all optimizer state
    whole: Callable[[Tensor, Tensor], tuple[Tensor, slice]] | None = None  # where matrices are cut

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What the optimizers update, by the weight's name."""
        return dict(model.named_parameters())

    def own_piece(self, name: str) -> Piece | None:
        """The rows of a weight that this rank updates; None where it updates all of it."""

    def stored(self, name: str, weight: nn.Parameter) -> tuple[Tensor, Piece | None]:
        """What this rank stores of a weight, and which rows of it, where not all."""
        return weight, None

    def reduce(self, model: nn.Module, loss: Tensor) -> None:
        """Sum gradients and the loss over the ranks, after the last backward pass of a step."""

    def clip(self, model: nn.Module, clip_norm: float) -> None:
        """Scale the gradients so that the norm of all is at most `clip_norm`."""
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)

    def spread(self, model: nn.Module) -> None:
        """Send updated weights to the ranks that do not own them."""


class Replicated(Alone):
    """`sharding = none`: every rank keeps everything and takes the same update."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def reduce(self, model: nn.Module, loss: Tensor) -> None:
        for weight in model.parameters():
            dist.all_reduce(weight.grad)
        dist.all_reduce(loss)


class OwnedPieces(Replicated):
    """What `optimizer` and `full` share: optimizers that update this rank's pieces."""

    cuts_state = True

    def __init__(self, model: nn.Module, recipe: TrainingRecipe) -> None:
        super().__init__()
        self.pieces: dict[str, list[Piece]] = {}
        for piece in pieces_of(model.shape, recipe):
            self.pieces.setdefault(piece.weight, []).append(piece)
        self.own = {
            name: self._parameter(weight, piece)
            for name, weight in model.named_parameters()
            for piece in self.pieces[name]
            if piece.owner == self.rank
        }

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self.own

    def clip(self, model: nn.Module, clip_norm: float) -> None:
        grads = [parameter.grad for parameter in self.own.values()]
        square = torch.nn.utils.get_total_norm(grads).square_()
        dist.all_reduce(square)
        torch.nn.utils.clip_grads_with_norm_(self.own.values(), clip_norm, square.sqrt_())

    def own_piece(self, name: str) -> Piece | None:
        return next((piece for piece in self.pieces[name] if piece.owner == self.rank), None)

    def _parameter(self, weight: nn.Parameter, piece: Piece) -> nn.Parameter:
        raise NotImplementedError


class OwnedStates(OwnedPieces):
    """`sharding = optimizer`: weights are everybody's, each piece has an owner who updates it."""

    def _parameter(self, weight: nn.Parameter, piece: Piece) -> nn.Parameter:
        return weight if piece.is_whole else nn.Parameter(_rows(weight.detach(), piece))

    def reduce(self, model: nn.Module, loss: Tensor) -> None:
        for name, weight in model.named_parameters():
            for piece in self.pieces[name]:
                dist.reduce(_rows(weight.grad, piece), dst=piece.owner)
        dist.all_reduce(loss)
        for name, weight in model.named_parameters():
            mine = self.own_piece(name)
            if mine is None:
                weight.grad = None
            elif not mine.is_whole:
                self.own[name].grad = _rows(weight.grad, mine)

    @torch.no_grad()
    def spread(self, model: nn.Module) -> None:
        for name, weight in model.named_parameters():
            if name in self.own:
                self.own[name].grad = None
            for piece in self.pieces[name]:
                dist.broadcast(_rows(weight.detach(), piece), src=piece.owner)


def _rows(tensor: Tensor, piece: Piece) -> Tensor:
    """A piece's rows of its weight, or of something of its shape: a view."""
    return tensor if piece.is_whole else tensor[piece.begin : piece.end]

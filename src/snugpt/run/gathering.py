"""A checkpoint of several ranks: what each keeps is gathered by the first, as if it had it all.

So the files are those of a run on one device, and any number of devices goes on from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from snugpt.estimate.sharding import Piece
from snugpt.model.gpt import GPT
from snugpt.model.parameter_wise import ParameterWise
from snugpt.run.tensor_file import optimizer_tensors, weights_of

Tensors = Mapping[str, Tensor]
Part = tuple[int, dict[str, Tensor]]  # the first row, and this rank's rows of each tensor by name


def gathered(model: GPT, optimizers: Sequence[ParameterWise]) -> tuple[Tensors, Tensors] | None:
    """Return all weights and all optimizer state on the first rank, None on the others.

    Every rank calls it. What is put together comes to lie in host memory, one weight after the
    other; weights that every rank has are not copied.
    """
    weights, state = weights_of(model), optimizer_tensors(model, optimizers)
    all_weights: dict[str, Tensor] = dict(weights)
    all_state: dict[str, Tensor] = {}
    for name, weight in weights.items():
        here, piece = model.ranks.stored(name, weight)
        if piece is not None:
            all_weights |= _gathered({name: here}, piece)
        of_weight = {key: v for key, v in state.items() if key.split("/")[1] == name}
        all_state |= _gathered(of_weight, model.ranks.own_piece(name))
    return (all_weights, all_state) if model.ranks.rank == 0 else None


def _gathered(tensors: Tensors, piece: Piece | None) -> dict[str, Tensor]:
    """The tensors of one weight, put together from the ranks' rows; scalars are the first's."""
    mine = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    part: Part = (0 if piece is None else piece.begin, mine)
    parts: list[Part] | None = None
    if dist.get_rank() == 0:
        parts = [part] * dist.get_world_size()
    dist.gather_object(part, parts)
    found: dict[str, list[Tensor]] = {}
    for _, rows in sorted(parts or [], key=lambda each: each[0]):
        for name, tensor in rows.items():
            found.setdefault(name, []).append(tensor)
    return {n: torch.cat(each) if each[0].dim() else each[0] for n, each in found.items()}

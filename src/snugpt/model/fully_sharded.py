"""`sharding = full`: PyTorch's FSDP2. Each rank keeps some rows of every weight and its state.

A block's weights are gathered when it is called and let go after it, in forward and in backward;
embedding and head stay from the first layer to the end of backward. Gathered are copies in the
compute dtype, but for those two, whose gradients are summed over many tokens; masters and summed
gradients are fp32. Every micro-step sums its gradients, so no rank keeps a whole one.

Optimizers see a rank's rows as plain tensors. Muon's matrices are gathered one after the other, and
every rank works out the same update.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from snugpt.estimate.sharding import Piece, row_range
from snugpt.model.ranks import OwnedPieces
from snugpt.spec.recipe import TrainingRecipe

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": None}


def shard_weights(model: nn.Module, recipe: TrainingRecipe) -> None:
    """Cut every weight of a model on the meta device; its values are set afterwards."""
    dtype = COMPUTE_DTYPES[recipe.compute_dtype]
    summed = None if dtype is None else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=summed, cast_forward_inputs=False)
    mesh = dist.device_mesh.init_device_mesh(_backend_device(), (recipe.world_size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for module in (*model.blocks, model):
        module.set_gradient_divide_factor(1.0)  # sums: each rank's loss is over all tokens
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    register_fsdp_forward_method(model, "states")
    model.calls_blocks = True  # which gathers their weights


class FullySharded(OwnedPieces):
    """FSDP2 gathers weights where they are used and has summed the gradients as backward ends."""

    def __init__(self, model: nn.Module, recipe: TrainingRecipe) -> None:
        super().__init__(model, recipe)
        # FSDP2 puts gathered weights in the place of these while it needs them
        self.weights = dict(model.named_parameters())
        self.piece_of = {self.own[name]: self.own_piece(name) for name in self.own}

    def _parameter(self, weight: nn.Parameter, piece: Piece) -> nn.Parameter:
        return nn.Parameter(weight.detach().to_local())

    def stored(self, name: str, weight: nn.Parameter) -> tuple[Tensor, Piece | None]:
        return self.own[name], self.own_piece(name)

    def reduce(self, model: nn.Module, loss: Tensor) -> None:
        dist.all_reduce(loss)
        for name, own in self.own.items():
            own.grad = self.weights[name].grad.to_local()

    def spread(self, model: nn.Module) -> None:
        for own in self.own.values():
            own.grad = None

    def whole(self, weight: Tensor, rows: Tensor) -> tuple[Tensor, slice]:
        """The matrix of which every rank gives the rows it updates, and which are this rank's."""
        piece = self.piece_of[weight]
        each = row_range(piece.rows, 0, self.size)[1]  # the first rank has the most
        if rows.shape[0] < each:
            padding = rows.new_zeros(each - rows.shape[0], piece.columns)
            rows = torch.cat([rows, padding])
        matrix = rows.new_empty(each * self.size, piece.columns)
        _all_gather(matrix, rows.contiguous())
        return matrix[: piece.rows], slice(piece.begin, piece.end)


# Its name until torch 2.12 warns from 2.13 on
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _backend_device() -> str:
    return "cpu" if dist.get_backend() == "gloo" else "cuda"

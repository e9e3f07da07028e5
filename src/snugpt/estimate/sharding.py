"""Several devices: who owns which rows, what each keeps of the optimizer, what they send.

`sharding = optimizer`: every weight is cut into pieces of whole rows, and each piece has one owner,
who alone keeps its optimizer state. Muon needs whole matrices, so those are one piece each and go,
the largest first, to whoever owns least; what AdamW takes is cut into equal rows, as nanochat cuts
its embeddings. `sharding = full`: FSDP2 cuts every weight into equal rows, and the optimizer
follows.

Gradients are summed in place and weights are sent in place: neither takes a buffer of PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from snugpt.estimate.operations import Weight
from snugpt.estimate.parameters import edge_weights, group_of, layer_weights, num_parameters
from snugpt.spec.gpu import Gpu
from snugpt.spec.recipe import BYTES, Optimizer, Sharding, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

FP32 = 4
# What collectives reach of a link's rate, and the rate where the catalogue has none. Assumed.
LINK_SHARE = 0.7
SLOW_LINK_BYTES_PER_S = 8e9
_NOT_WITH_FULL = {"compile": "off", "weight_dtype": "master", "fp8": "off", "offload": "none"}


class Piece(NamedTuple):
    """Rows `begin` to `end` of one weight, by its name in the model, and the rank that owns them.

    May be none where there are more ranks than rows: every rank has a part in what all do.
    """

    weight: str
    begin: int
    end: int
    owner: int
    rows: int  # of the whole weight
    columns: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its weight."""
        return self.end - self.begin == self.rows

    @property
    def elements(self) -> int:
        """Elements of the piece."""
        return (self.end - self.begin) * self.columns


def named_weights(shape: ModelShape) -> Iterator[tuple[str, Weight]]:
    """Every weight with the name it has in `GPT.named_parameters`, in that order."""
    yield from edge_weights(shape).items()
    for layer in range(shape.num_layers):
        for name, weight in layer_weights(shape, layer).items():
            yield f"blocks.{layer}.{name}", weight


def row_range(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows of one rank when a weight is cut as `torch.chunk` cuts; the last may have none."""
    each = -(-rows // world_size)
    return min(rank * each, rows), min((rank + 1) * each, rows)


@cache
def pieces(
    shape: ModelShape, optimizer: Optimizer, sharding: Sharding, world_size: int
) -> tuple[Piece, ...]:
    """Return every piece of a model whose state is sharded, by weight and row.

    The same on every rank.
    """
    found: dict[str, list[Piece]] = {}
    whole: list[tuple[str, Weight]] = []
    for name, weight in named_weights(shape):
        by_muon = optimizer == "muon" and group_of(weight.name) == "matrices"
        uncut = by_muon or weight.rows < world_size
        if sharding == "optimizer" and uncut:
            whole.append((name, weight))
            found[name] = []
        else:
            found[name] = [*_cut(name, weight, world_size)]
    owned = [0] * world_size
    for name, weight in sorted(whole, key=lambda each: (-each[1].elements, each[0])):
        owner = owned.index(min(owned))
        owned[owner] += weight.elements
        found[name] = [_whole(name, weight, owner)]
    return tuple(piece for each in found.values() for piece in each)


def pieces_of(shape: ModelShape, recipe: TrainingRecipe) -> tuple[Piece, ...]:
    """The pieces of a recipe."""
    return pieces(shape, recipe.optimizer, recipe.sharding, recipe.world_size)


def _whole(name: str, weight: Weight, owner: int) -> Piece:
    rows = first_axis(weight)
    return Piece(name, 0, rows, owner, rows, weight.elements // rows)


def _cut(name: str, weight: Weight, world_size: int) -> Iterator[Piece]:
    rows = first_axis(weight)
    for rank in range(world_size):
        begin, end = row_range(rows, rank, world_size)
        yield Piece(name, begin, end, rank, rows, weight.elements // rows)


def first_axis(weight: Weight) -> int:
    """The length of a weight's first axis: a vector, which is one row here, has it alone."""
    return weight.columns if group_of(weight.name) == "norms" else weight.rows


def heaviest_rank(shape: ModelShape, recipe: TrainingRecipe) -> int:
    """The rank that keeps the most optimizer state: the one a plan has to fit."""
    kept = [0] * recipe.world_size
    for piece in pieces_of(shape, recipe):
        kept[piece.owner] += piece.elements * moments(piece.weight, recipe.optimizer)
    return kept.index(max(kept))


def moments(weight: str, optimizer: Optimizer) -> int:
    """Tensors of a parameter's size that its optimizer keeps: Muon one, AdamW two."""
    name = weight.rpartition(".")[2]
    return 1 if optimizer == "muon" and group_of(name) == "matrices" else 2


def sent_bytes(shape: ModelShape, recipe: TrainingRecipe) -> int:
    """Bytes that pass through each device's link in one step, in each direction.

    A ring sends (n - 1) / n of a tensor to sum it at its owners, and as much to copy it to all.
    none: fp32 gradients, summed and copied. optimizer: gradients summed at their owners, weights
    copied, as many bytes. full: weights in the compute dtype copied for forward and for backward,
    fp32 gradients summed, in each micro-step.
    """
    n = recipe.world_size
    each = 2 * FP32
    if recipe.sharding == "full":
        each = (2 * BYTES[recipe.compute_dtype] + FP32) * recipe.grad_accum_steps
    return num_parameters(shape) * each * (n - 1) // n


def sending_s(shape: ModelShape, recipe: TrainingRecipe, gpu: Gpu) -> float:
    """Seconds of one step's sums and copies, none of them beside arithmetic. Assumed."""
    if recipe.world_size == 1:
        return 0.0
    link = gpu.peer_link_bytes_per_s or gpu.host_link_bytes_per_s or SLOW_LINK_BYTES_PER_S
    return sent_bytes(shape, recipe) / (link * LINK_SHARE)


def why_not_sharded(shape: ModelShape, recipe: TrainingRecipe, runtime: Runtime) -> str | None:
    """Return what stands against `sharding` optimizer or full, or None."""
    if recipe.world_size == 1:
        return "it is for several GPUs"
    if recipe.state_dtype == "int8":
        return "moments in int8 have one scale to 256 elements, which rows would cut"
    if recipe.compute_dtype == "fp16":
        return "gradients that overflow in fp16 are seen by their owners only"
    if recipe.sharding == "full":
        return _why_not_full(recipe)
    return None


def _why_not_full(recipe: TrainingRecipe) -> str | None:
    for lever, default in _NOT_WITH_FULL.items():
        if getattr(recipe, lever) != default:
            return f"{lever} = {getattr(recipe, lever)} is not derived for gathered weights"
    return None

"""Build a model: on the meta device to count it, on a real one to run it; set its first weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from snugpt.estimate import parameters
from snugpt.estimate.sharding import row_range
from snugpt.model.gpt import DTYPES, GPT, rotary_angles
from snugpt.model.loss_scale import LossScale
from snugpt.model.offload import offload_activations
from snugpt.model.ranks import Alone, OwnedStates, Replicated
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape, ParameterGroup


def build(
    shape: ModelShape,
    runtime: Runtime,
    *,
    compute_dtype: str = "fp32",
    weight_dtype: str = "fp32",
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> GPT:
    """Return the model on `device`; with a seed its weights are set, without they are empty."""
    with torch.device(device), _new_tensors_are(DTYPES[weight_dtype]):
        model = GPT(shape, runtime, compute_dtype)
    if seed is not None:
        set_weights(model, seed)
    return model


def build_for_training(
    shape: ModelShape,
    recipe: TrainingRecipe,
    runtime: Runtime,
    *,
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> GPT:
    """Return the model with the levers of a recipe set that the model itself has."""
    stored = "bf16" if recipe.weight_dtype == "bf16" else "fp32"
    if recipe.sharding == "full":
        model = sharded(shape, recipe, runtime, device, seed)
    else:
        model = build(
            shape, runtime, compute_dtype=recipe.compute_dtype, weight_dtype=stored, device=device,
            seed=seed,
        )  # fmt: skip
    model.ranks = ranks_of(model, recipe)
    model.recompute_blocks = recipe.checkpoint == "blocks"
    if recipe.offload == "activations":
        offload_activations(model)
    for block in model.blocks:
        block.fp8 = recipe.fp8 == "on"
        block.made_again = recipe.selective_steps
    if recipe.compute_dtype == "fp16":
        model.loss_scale = LossScale(model.embedding.device)
    if recipe.compile == "on":
        from snugpt.model.compiling import compile_sublayers  # Dynamo is slow to import

        compile_sublayers(model)
    return model


def sharded(
    shape: ModelShape,
    recipe: TrainingRecipe,
    runtime: Runtime,
    device: torch.device | str,
    seed: int | None,
) -> GPT:
    """Return a model of which this rank holds its rows only; never a whole copy, not even here."""
    from snugpt.model.fully_sharded import shard_weights  # FSDP2 is slow to import

    model = build(shape, runtime, compute_dtype=recipe.compute_dtype, device="meta")
    shard_weights(model, recipe)
    model.to_empty(device=device)
    if model.angles is not None:
        with torch.device(device):
            model.angles = rotary_angles(shape, model.dtype)
    if seed is not None:
        set_weights(model, seed)
    return model


def ranks_of(model: GPT, recipe: TrainingRecipe) -> Alone:
    """What stands beside a model that trains by `recipe`; the process group is there by then."""
    if recipe.world_size == 1:
        return Alone()
    if recipe.sharding == "none":
        return Replicated()
    if recipe.sharding == "optimizer":
        return OwnedStates(model, recipe)
    from snugpt.model.fully_sharded import FullySharded  # FSDP2 is slow to import

    return FullySharded(model, recipe)


def build_for_generation(shape: ModelShape, runtime: Runtime, weight_dtype: str, device) -> GPT:
    """Return an empty model without gradients whose weights are stored in `weight_dtype`."""
    with torch.device(device):
        model = GPT(shape, runtime, weight_dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(DTYPES[weight_dtype])
    return model.eval()


@contextmanager
def _new_tensors_are(dtype: torch.dtype) -> Iterator[None]:
    """Tensors made in the block without a dtype of their own have this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def group_of(name: str) -> ParameterGroup:
    """The group of a parameter by the name it has in `GPT`."""
    return parameters.group_of(name.rsplit(".", 1)[-1])


@torch.no_grad()
def set_weights(model: GPT, seed: int) -> None:
    """Draw the first weights. The same seed gives the same weights on one kind of device.

    nanochat style: unit-variance embeddings (they are normed), uniform matrices of variance 1 / C,
    projections into the residual stream zero, head 0.001. Others: 0.02, residual projections
    0.02 / sqrt(2 L), as in GPT-2. Norm weights one, value gates zero (they then let half through).
    Weights in bf16 are those of fp32, rounded.
    """
    generator = torch.Generator(model.embedding.device).manual_seed(seed)
    for name, weight in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if model.calls_blocks:  # every rank draws the whole weight and keeps its rows
            drawn = torch.empty(weight.shape, device=weight.device)
            _set_weight(leaf, drawn, model.shape, generator)
            begin, end = row_range(weight.shape[0], dist.get_rank(), dist.get_world_size())
            weight.to_local().copy_(drawn[begin:end])
            continue
        drawn = torch.empty_like(weight, dtype=torch.float32) if weight.itemsize < 4 else weight
        _set_weight(leaf, drawn, model.shape, generator)
        if drawn is not weight:
            weight.copy_(drawn)


def _set_weight(leaf: str, weight: Tensor, shape: ModelShape, generator: torch.Generator) -> None:
    if leaf.endswith("norm"):
        weight.fill_(1.0)
    elif shape.style != "nanochat":
        residual = leaf in ("output", "down")
        std = 0.02 / math.sqrt(2 * shape.num_layers) if residual else 0.02
        weight.normal_(0.0, std, generator=generator)
    elif leaf in ("output", "down", "value_gate"):
        weight.zero_()
    elif leaf in ("embedding", "head"):
        weight.normal_(0.0, 1.0 if leaf == "embedding" else 0.001, generator=generator)
    else:
        bound = math.sqrt(3.0 / shape.model_dim)  # uniform with variance 1 / C
        weight.uniform_(-bound, bound, generator=generator)

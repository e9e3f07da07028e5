"""Who updates what: Muon the matrices, AdamW everything else, each group at its own rate.

State per parameter in fp32: Muon one momentum (4 bytes), AdamW two moments (8 bytes); `state_dtype`
stores them in 2 bytes or in 1 each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snugpt.estimate.updating import Updating, stored_as
from snugpt.model.adamw import AdamW
from snugpt.model.build import group_of
from snugpt.model.gpt import GPT
from snugpt.model.muon import Muon
from snugpt.model.parameter_wise import ParameterWise
from snugpt.model.stored_state import Bf16, Format, Fp32, Int8, require_torchao
from snugpt.spec.recipe import StateDtype, TrainingRecipe

ADAMW_BETAS = (0.8, 0.95)
ADAMW_EPS = 1e-8
# Scales of the AdamW rate by group; width-dependent parts as in nanochat's base_train (July 2026)
EMBEDDING_RATE, VALUE_EMBEDDING_RATE, HEAD_RATE = 30.0, 15.0, 1.0


def optimizers_for(model: GPT, recipe: TrainingRecipe) -> list[ParameterWise]:
    """The optimizers of a recipe; together they own every parameter once."""
    schedule, updating = recipe.schedule, Updating.of(recipe)
    groups: dict[str, list[Tensor]] = {}
    for name, weight in model.named_parameters():
        groups.setdefault(group_of(name), []).append(weight)
    stored = {
        "formats": formats_of(model, recipe.state_dtype),
        "names": {weight: name for name, weight in model.named_parameters()},
        "seed": schedule.seed,
    }
    optimizers: list[ParameterWise] = []
    if updating.optimizer == "muon":
        on_cuda = model.runtime.device == "cuda"  # where bf16 is fast
        optimizers.append(
            Muon(
                groups.pop("matrices"),
                schedule.matrix_learning_rate,
                weight_decay=schedule.weight_decay,
                dtype=torch.bfloat16 if on_cuda else torch.float32,
                **stored,
            )
        )
    scales = {"embedding": EMBEDDING_RATE, "value_embedding": VALUE_EMBEDDING_RATE}
    if recipe.optimizer == "adamw" or model.shape.tied_embeddings:
        scales = {}
    adamw = [
        {
            "params": weights,
            "lr": schedule.learning_rate * scales.get(group, HEAD_RATE),
            "weight_decay": schedule.weight_decay if group == "matrices" else 0.0,
        }
        for group, weights in groups.items()
    ]
    optimizers.append(AdamW(adamw, betas=ADAMW_BETAS, eps=ADAMW_EPS, **stored))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    if recipe.steps_in_backward:
        make_states(optimizers)
    return optimizers


def formats_of(model: GPT, state_dtype: StateDtype) -> dict[Tensor, Format]:
    """How the moments of each parameter are stored.

    Raises:
        FailedError: torchao is not installed and int8 needs it.
    """
    if state_dtype == "int8":
        require_torchao()
    formats: dict[StateDtype, Format] = {"fp32": Fp32(), "bf16": Bf16(), "int8": Int8()}
    return {w: formats[stored_as(state_dtype, w.numel())] for w in model.parameters()}


def make_states(optimizers: list[ParameterWise]) -> None:
    """Make all state at once, before activations lie where it would fall in between."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                optimizer.state_of(weight)

"""Who updates what: Muon the matrices, AdamW everything else, each group at its own rate.

State per parameter in fp32: Muon one momentum (4 bytes), AdamW two moments (8 bytes); `state_dtype`
stores them in 2 bytes or in 1 each.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from snugpt.estimate.state_on_host import stage_bytes
from snugpt.estimate.updating import Updating, muon_dtype, stored_as
from snugpt.model.adamw import AdamW
from snugpt.model.build import group_of
from snugpt.model.gpt import DTYPES, GPT
from snugpt.model.muon import Muon
from snugpt.model.parameter_wise import WITHOUT_MEMORY, ParameterWise
from snugpt.model.state_on_host import StateOnHost
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
    owned = model.ranks.parameters(model)
    for name, weight in owned.items():
        groups.setdefault(group_of(name), []).append(weight)
    stored = {
        "formats": formats_of(owned.values(), recipe.state_dtype),
        "names": {weight: name for name, weight in owned.items()},
        "seed": schedule.seed,
    }
    optimizers: list[ParameterWise] = []
    if updating.optimizer == "muon":
        whole = model.ranks.whole
        optimizers.append(
            Muon(
                groups.pop("matrices"),
                schedule.matrix_learning_rate,
                weight_decay=schedule.weight_decay,
                dtype=DTYPES[muon_dtype(model.runtime, cut=whole is not None)],
                whole=whole,
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
    if updating.on_host:
        on_host = StateOnHost(stage_bytes(model.shape, updating), model.embedding.device)
        for optimizer in optimizers:
            optimizer.on_host = on_host
        place_states(optimizers, on_host)
    if updating.on_host or recipe.steps_in_backward:
        make_states(optimizers)
    return optimizers


def formats_of(weights: Iterable[Tensor], state_dtype: StateDtype) -> dict[Tensor, Format]:
    """How the moments of each parameter are stored.

    Raises:
        FailedError: torchao is not installed and int8 needs it.
    """
    if state_dtype == "int8":
        require_torchao()
    formats: dict[StateDtype, Format] = {"fp32": Fp32(), "bf16": Bf16(), "int8": Int8()}
    return {w: formats[stored_as(state_dtype, w.numel())] for w in weights}


def place_states(optimizers: list[ParameterWise], on_host: StateOnHost) -> None:
    """Lay all state that belongs there into host memory at once."""
    on_host.place(
        (optimizer.state[weight], optimizer.empty_state(weight, WITHOUT_MEMORY))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for weight in group["params"]
        if optimizer.moves(weight)
    )


def make_states(optimizers: list[ParameterWise]) -> None:
    """Make all state at once, before activations lie where it would fall in between."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                optimizer.state_of(weight)

"""The parameters of a GPT by name, size and group, without building it.

Names and sizes are those of `model/gpt.py`; a test holds every one of them against the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from snugpt.estimate.operations import Weight
from snugpt.spec.shape import GATE_CHANNELS, ModelShape, ParameterGroup


def layer_weights(shape: ModelShape, layer: int) -> dict[str, Weight]:
    """The weights of one layer by the name they have in `Block`; a vector has one row."""
    C, M, KD, K = shape.model_dim, shape.mlp_dim, shape.kv_dim, shape.num_kv_heads
    sizes = {
        "query": (C, C),
        "key": (KD, C),
        "value": (KD, C),
        "output": (C, C),
        "up": (M, C),
        "down": (C, M),
    }
    if shape.style == "llama":
        sizes["gate"] = (M, C)
    if shape.style != "nanochat":
        sizes |= {"attention_norm": (1, C), "mlp_norm": (1, C)}
    if shape.has_value_embedding(layer):
        sizes |= {
            "value_embedding": (shape.padded_vocab_size, KD),
            "value_gate": (K, GATE_CHANNELS),
        }
    return {name: Weight(name, rows, columns) for name, (rows, columns) in sizes.items()}


def edge_weights(shape: ModelShape) -> dict[str, Weight]:
    """The weights outside the layers: embedding, positions, last norm, head (absent where tied)."""
    V, C = shape.padded_vocab_size, shape.model_dim
    sizes = {"embedding": (V, C)}
    if shape.style == "gpt2":
        sizes["positions"] = (shape.context_len, C)
    if shape.style != "nanochat":
        sizes["norm"] = (1, C)
    if not shape.tied_embeddings:
        sizes["head"] = (V, C)
    return {name: Weight(name, rows, columns) for name, (rows, columns) in sizes.items()}


def group_of(name: str) -> ParameterGroup:
    """The group of a weight by its name."""
    match name:
        case "embedding" | "positions":
            return "embedding"
        case "value_embedding":
            return "value_embedding"
        case "head":
            return "head"
    return "norms" if name.endswith("norm") else "matrices"


def all_weights(shape: ModelShape) -> Iterator[Weight]:
    """Every weight of the model, once each."""
    yield from edge_weights(shape).values()
    for layer in range(shape.num_layers):
        yield from layer_weights(shape, layer).values()


def parameter_groups(shape: ModelShape) -> dict[ParameterGroup, int]:
    """Count the parameters by group; the sum is the whole model.

    nanochat d12: embedding 25.2M, value_embedding 151.0M, head 25.2M, matrices 84.9M.
    """
    groups: dict[ParameterGroup, int] = {}
    kinds = layer_kinds(shape)
    for weight in edge_weights(shape).values():
        _count(groups, weight, 1)
    for layer, repeats in kinds.items():
        for weight in layer_weights(shape, layer).values():
            _count(groups, weight, repeats)
    return groups


@lru_cache(maxsize=4096)
def num_parameters(shape: ModelShape) -> int:
    """All parameters of the model."""
    return sum(parameter_groups(shape).values())


def scaling_parameters(shape: ModelShape) -> int:
    """The parameters that set the training horizon, by the style's convention.

    nanochat: matrices + head (base_train.py, July 2026). Others: all but the embeddings, which is
    what the 20 tokens per parameter of Hoffmann et al. (arXiv 2203.15556) are usually counted on.
    """
    groups = parameter_groups(shape)
    if shape.style == "nanochat":
        return groups["matrices"] + groups.get("head", groups["embedding"])
    return sum(n for group, n in groups.items() if group not in ("embedding", "head"))


def layer_kinds(shape: ModelShape) -> dict[int, int]:
    """One layer of each kind, with how many there are: with and without a value embedding."""
    mixing = [i for i in range(shape.num_layers) if shape.has_value_embedding(i)]
    plain = shape.num_layers - len(mixing)
    kinds = {mixing[0]: len(mixing)} if mixing else {}
    if plain:
        kinds[next(i for i in range(shape.num_layers) if i not in mixing)] = plain
    return kinds


def _count(groups: dict[ParameterGroup, int], weight: Weight, repeats: int) -> None:
    group = group_of(weight.name)
    groups[group] = groups.get(group, 0) + repeats * weight.elements

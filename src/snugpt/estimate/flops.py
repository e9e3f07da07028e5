"""Floating-point operations of training and generation, by nanochat's convention.

A matrix of P elements costs 2 P per token forward and 4 P backward. Attention costs 4 x width x
visible tokens per layer forward and twice that backward; a causal layer is counted as if it saw its
whole window (PaLM, arXiv 2204.02311, appendix B; nanochat `estimate_flops`, July 2026).
"""

from __future__ import annotations

from functools import lru_cache

from snugpt.estimate.parameters import layer_kinds, layer_weights, parameter_groups
from snugpt.spec.recipe import BYTES, SelectiveStep, TrainingRecipe
from snugpt.spec.shape import ModelShape

NEWTON_SCHULZ_STEPS = 5
MULTIPLIED_AGAIN: dict[SelectiveStep, tuple[str, ...]] = {  # the weights of a layer by their names
    "pointwise": (),
    "qkv": ("query", "key", "value", "value_gate"),
    "up": ("up", "gate"),
}


def matmul_parameters(shape: ModelShape) -> int:
    """Elements that are multiplied with every token: the matrices and the head."""
    groups = parameter_groups(shape)
    return groups["matrices"] + shape.vocab_size * shape.model_dim


def attention_flops_per_token(shape: ModelShape, seq_len: int) -> int:
    """Forward cost of attention for one token: 4 x width x visible tokens, summed over layers."""
    visible = sum(min(shape.window_tokens(i) or seq_len, seq_len) for i in range(shape.num_layers))
    return 4 * shape.model_dim * visible


@lru_cache(maxsize=4096)
def forward_flops_per_token(shape: ModelShape, seq_len: int) -> int:
    """Cost of one token in the forward pass."""
    return 2 * matmul_parameters(shape) + attention_flops_per_token(shape, seq_len)


def training_flops_per_token(shape: ModelShape, seq_len: int) -> int:
    """Cost of one token forward and backward, what MFU counts; recomputation is not in it.

    nanochat d12, T 2048: 7.6e8.
    """
    return 3 * forward_flops_per_token(shape, seq_len)


def executed_flops_per_token(shape: ModelShape, recipe: TrainingRecipe) -> int:
    """What is really computed: the counted cost and the products that are made again."""
    return training_flops_per_token(shape, recipe.seq_len) + recomputed_flops_per_token(
        shape, recipe
    )


def recomputed_flops_per_token(shape: ModelShape, recipe: TrainingRecipe) -> int:
    """Cost of what `checkpoint` makes again, of one token.

    `blocks` runs the layers forward once more, all of them (torch.utils.checkpoint stops behind the
    last product, which keeps its input); `selective` the products of its steps. nanochat d24,
    T 2048: qkv +7.1 %, up +9.5 %, blocks +31.2 % of a step's cost.
    """
    if recipe.checkpoint == "blocks":
        return layers_flops_per_token(shape, recipe.seq_len)
    return 2 * multiplied_again(shape, recipe.selective_steps)


@lru_cache(maxsize=4096)
def multiplied_again(shape: ModelShape, steps: tuple[SelectiveStep, ...]) -> int:
    """Elements of the matrices that steps of `checkpoint = selective` multiply with once more."""
    names = {name for step in steps for name in MULTIPLIED_AGAIN[step]}
    return sum(
        repeats * weight.elements
        for layer, repeats in layer_kinds(shape).items()
        for name, weight in layer_weights(shape, layer).items()
        if name in names
    )


def layers_flops_per_token(shape: ModelShape, seq_len: int) -> int:
    """Cost of one token in the forward pass of all layers, without the head."""
    head = 2 * shape.vocab_size * shape.model_dim
    return forward_flops_per_token(shape, seq_len) - head


def recompute_factor(shape: ModelShape, recipe: TrainingRecipe) -> float:
    """What the layers compute in a step to what they must: 4 / 3 with `checkpoint = blocks`."""
    needed = 3 * layers_flops_per_token(shape, recipe.seq_len)
    return 1 + recomputed_flops_per_token(shape, recipe) / needed


def traffic_again_bytes_per_token(shape: ModelShape, recipe: TrainingRecipe) -> int:
    """Bytes that step `pointwise` reads and writes for one token: two norms and the activation.

    Other steps' pointwise work goes with their products, as it does in the rest of the step.
    """
    if "pointwise" not in recipe.selective_steps:
        return 0
    read = 2 if shape.style == "llama" else 1
    activation = 0 if "up" in recipe.selective_steps else (read + 1) * shape.mlp_dim
    elements = 2 * 2 * shape.model_dim + activation
    return shape.num_layers * elements * BYTES[recipe.compute_dtype]


@lru_cache(maxsize=4096)
def muon_flops(shape: ModelShape) -> int:
    """Cost of one step's orthogonalisation: 5 x (4 m^2 n + 2 m^3) for each m x n matrix, m <= n."""
    C, M, KD = shape.model_dim, shape.mlp_dim, shape.kv_dim
    mlp = 3 if shape.style == "llama" else 2
    sizes = [(C, C)] * 2 + [(KD, C)] * 2 + [(M, C)] * mlp
    per_layer = sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in sizes)
    return NEWTON_SCHULZ_STEPS * shape.num_layers * per_layer

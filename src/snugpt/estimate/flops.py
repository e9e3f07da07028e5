"""Floating-point operations of training and generation, by nanochat's convention.

A matrix of P elements costs 2 P per token forward and 4 P backward. Attention costs 4 x width x
visible tokens per layer forward and twice that backward; a causal layer is counted as if it saw its
whole window (PaLM, arXiv 2204.02311, appendix B; nanochat `estimate_flops`, July 2026).
"""

from __future__ import annotations

from snugpt.estimate.parameters import parameter_groups
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import ModelShape

NEWTON_SCHULZ_STEPS = 5


def matmul_parameters(shape: ModelShape) -> int:
    """Elements that are multiplied with every token: the matrices and the head."""
    groups = parameter_groups(shape)
    return groups["matrices"] + shape.vocab_size * shape.model_dim


def attention_flops_per_token(shape: ModelShape, seq_len: int) -> int:
    """Forward cost of attention for one token: 4 x width x visible tokens, summed over layers."""
    visible = sum(min(shape.window_tokens(i) or seq_len, seq_len) for i in range(shape.num_layers))
    return 4 * shape.model_dim * visible


def forward_flops_per_token(shape: ModelShape, seq_len: int) -> int:
    """Cost of one token in the forward pass."""
    return 2 * matmul_parameters(shape) + attention_flops_per_token(shape, seq_len)


def training_flops_per_token(shape: ModelShape, seq_len: int) -> int:
    """Cost of one token forward and backward, what MFU counts; recomputation is not in it.

    nanochat d12, T 2048: 7.6e8.
    """
    return 3 * forward_flops_per_token(shape, seq_len)


def executed_flops_per_token(shape: ModelShape, recipe: TrainingRecipe) -> int:
    """What is really computed: with `checkpoint = blocks` the layers run forward once more."""
    counted = training_flops_per_token(shape, recipe.seq_len)
    if recipe.checkpoint == "none":
        return counted
    head = 2 * shape.vocab_size * shape.model_dim
    return counted + forward_flops_per_token(shape, recipe.seq_len) - head


def muon_flops(shape: ModelShape) -> int:
    """Cost of one step's orthogonalisation: 5 x (4 m^2 n + 2 m^3) for each m x n matrix, m <= n."""
    C, M, KD = shape.model_dim, shape.mlp_dim, shape.kv_dim
    mlp = 3 if shape.style == "llama" else 2
    sizes = [(C, C)] * 2 + [(KD, C)] * 2 + [(M, C)] * mlp
    per_layer = sum(4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3 for s in sizes)
    return NEWTON_SCHULZ_STEPS * shape.num_layers * per_layer

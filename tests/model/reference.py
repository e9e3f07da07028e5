"""The three styles written once more in plain PyTorch, for reading and for checking against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from snugpt.spec.shape import ModelShape

EPS = 1e-5
BASE = {"nanochat": 100_000.0, "llama": 10_000.0}


def mean_loss(weights: dict[str, Tensor], shape: ModelShape, tokens: Tensor, targets: Tensor):
    """The mean cross-entropy in nats; `weights` by the names they have in the model."""
    return F.cross_entropy(logits(weights, shape, tokens).flatten(0, 1), targets.flatten())


def logits(weights: dict[str, Tensor], shape: ModelShape, tokens: Tensor) -> Tensor:
    """(B, T) -> (B, T, V)."""
    x = F.embedding(tokens, weights["embedding"])
    if shape.style == "nanochat":
        x = F.rms_norm(x, x.shape[-1:], eps=EPS)
    if shape.style == "gpt2":
        x = x + weights["positions"][: tokens.shape[1]]
    for layer in range(shape.num_layers):
        prefix = f"blocks.{layer}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        h = norm(x, shape, own.get("attention_norm"))
        x = x + attention(h, own, shape, tokens, shape.window_tokens(layer))
        x = x + mlp(norm(x, shape, own.get("mlp_norm")), own, shape)
    x = norm(x, shape, weights.get("norm"))
    head = weights["embedding"] if shape.tied_embeddings else weights["head"]
    out = F.linear(x, head)[..., : shape.vocab_size]
    cap = shape.logit_softcap
    return out if cap is None else cap * torch.tanh(out / cap)


def norm(x: Tensor, shape: ModelShape, weight: Tensor | None) -> Tensor:
    if shape.style == "gpt2":
        return F.layer_norm(x, x.shape[-1:], weight, eps=EPS)
    return F.rms_norm(x, x.shape[-1:], weight, eps=EPS)


def attention(
    h: Tensor, own: dict[str, Tensor], shape: ModelShape, tokens: Tensor, window: int | None
) -> Tensor:
    B, T, C = h.shape
    q, k, v = (
        F.linear(h, own[name]).view(B, T, -1, shape.head_dim) for name in ("query", "key", "value")
    )
    if "value_gate" in own:
        gate = 2 * torch.sigmoid(F.linear(h[..., :12], own["value_gate"]))
        v = v + gate[..., None] * F.embedding(tokens, own["value_embedding"]).view(v.shape)
    if shape.style != "gpt2":
        q, k = (rotated(x, BASE[shape.style]) for x in (q, k))
    if shape.style == "nanochat":
        q, k = (F.rms_norm(x, x.shape[-1:], eps=EPS) for x in (q, k))
    age = torch.arange(T)[:, None] - torch.arange(T)  # of key j when query i looks at it
    seen = (age >= 0) & (age < (window or T))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return F.linear(y.transpose(1, 2).reshape(B, T, C), own["output"])


def rotated(x: Tensor, base: float) -> Tensor:
    """Channels i and i + D/2 are one complex number, turned back by position / base^(2i / D)."""
    T, D = x.shape[1], x.shape[-1]
    angle = torch.arange(T)[:, None, None] * base ** (-torch.arange(0, D, 2) / D)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    z = z * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat([z.real, z.imag], -1)


def mlp(h: Tensor, own: dict[str, Tensor], shape: ModelShape) -> Tensor:
    up = F.linear(h, own["up"])
    if shape.style == "nanochat":
        inner = F.relu(up) ** 2
    elif shape.style == "gpt2":
        inner = F.gelu(up)
    else:
        inner = F.silu(F.linear(h, own["gate"])) * up
    return F.linear(inner, own["down"])

"""GPT: one module for three styles.

    tokens -> embedding [+ positions] [norm] -> L x (attention, mlp) -> norm -> head

Every sublayer is `x + f(norm(x))`. The methods are flat and drop their locals early, because a
local name keeps a tensor as surely as autograd does: what is alive when is part of the product.

Shapes: B batch, T time, C model_dim, H heads, K kv heads, D head_dim, M mlp_dim, V padded
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snugpt.model import functions as op
from snugpt.model.attention import attend, window_mask
from snugpt.model.fp8 import Fp8Linear
from snugpt.model.kv_cache import KVCache
from snugpt.model.loss import HeadLoss, capped_logits, token_losses
from snugpt.model.loss_scale import LossScale
from snugpt.model.making_again import keeping
from snugpt.model.ranks import Alone
from snugpt.spec.recipe import SelectiveStep
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import GATE_CHANNELS, ROPE_BASE, ModelShape, Style

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(slots=True)
class LayerInputs:
    """What every layer reads beside x: token ids, rotary angles, window masks, the cache."""

    tokens: Tensor  # (B, T)
    angles: tuple[Tensor, Tensor] | None = None  # cosine and sine, (T, 1, D / 2) each
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by window, (T, T)
    cache: KVCache | None = None


class Block(nn.Module):
    """One layer's weights and its two sublayers."""

    def __init__(self, shape: ModelShape, layer: int, runtime: Runtime) -> None:
        super().__init__()
        C, HD, KD, M = shape.model_dim, shape.model_dim, shape.kv_dim, shape.mlp_dim
        self.shape, self.layer, self.runtime = shape, layer, runtime
        self.window = shape.window_tokens(layer)
        self.query = empty(HD, C)
        self.key = empty(KD, C)
        self.value = empty(KD, C)
        self.output = empty(C, HD)
        self.up = empty(M, C)
        self.down = empty(C, M)
        self.gate = empty(M, C) if shape.style == "llama" else None
        self.attention_norm = None if shape.style == "nanochat" else empty(C)
        self.mlp_norm = None if shape.style == "nanochat" else empty(C)
        mixes = shape.has_value_embedding(layer)
        self.value_embedding = empty(shape.padded_vocab_size, KD) if mixes else None
        self.value_gate = empty(shape.num_kv_heads, GATE_CHANNELS) if mixes else None

        self.fp8 = False  # the lever `fp8 = on`
        self.made_again: tuple[SelectiveStep, ...] = ()  # the lever `checkpoint = selective`
        self.compiled: tuple[Callable[..., Tensor], ...] | None = None  # the lever `compile = on`

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """Both sublayers, (B, T, C) -> (B, T, C): what `checkpoint = blocks` recomputes."""
        attention, mlp = self.sublayers
        x = attention(x, inputs)
        return mlp(x)

    @property
    def sublayers(self) -> tuple[Callable[..., Tensor], ...]:
        """Attention and mlp as a call runs them: compiled ones only where gradients are made."""
        if self.compiled is not None and torch.is_grad_enabled():
            return self.compiled
        return self.attention, self.mlp

    def attention(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        """x + out(attention(norm(x)))."""
        (B, T, _), style, device = x.shape, self.shape.style, self.runtime.device
        with keeping(self.made_again) as keep:
            h = keep.unless({"pointwise"}, normed, style, x, self.attention_norm, device)
            q, k, v, *mixed = keep.unless({"qkv"}, self.heads, h, inputs)
            del h, mixed
            if inputs.cache is not None:
                k, v = inputs.cache.extend(self.layer, k, v, self.window)
            y = attend(
                q, k, v, backend=self.runtime.attention, window=self.window,
                mask=inputs.masks.get(self.window), dropout=self.dropout,
            )  # fmt: skip
            del q, k, v
        y = self.linear(y.view(B, T, -1), self.output)
        y = self.dropped(y)
        return op.ResidualAdd.apply(x, y)

    def mlp(self, x: Tensor) -> Tensor:
        """x + down(activation(up(norm(x))))."""
        style, device = self.shape.style, self.runtime.device
        with keeping(self.made_again) as keep:
            h = keep.unless({"pointwise"}, normed, style, x, self.mlp_norm, device)
            inner = keep.unless({"up"}, self.projected, h)
            del h
            a = keep.unless({"pointwise", "up"}, self.activated, *inner)
            del inner
            a = self.linear(a, self.down)
        a = self.dropped(a)
        return op.ResidualAdd.apply(x, a)

    def heads(self, h: Tensor, inputs: LayerInputs) -> tuple[Tensor, ...]:
        """Queries, keys and values as attention reads them: (B, T, H, D), (B, T, K, D) twice.

        Where values are mixed with embeddings, also those: their gate keeps them.
        """
        shape, device = self.shape, self.runtime.device
        B, T, _ = h.shape
        mixed: tuple[Tensor, ...] = ()
        q = self.linear(h, self.query).view(B, T, shape.num_heads, shape.head_dim)
        k = self.linear(h, self.key).view(B, T, shape.num_kv_heads, shape.head_dim)
        v = self.linear(h, self.value).view(B, T, shape.num_kv_heads, shape.head_dim)
        if self.value_embedding is not None:
            ve = op.Embedding.apply(self.value_embedding, inputs.tokens, v.dtype, device)
            mixed = (ve.view(v.shape),)
            del ve
            v = op.ValueGate.apply(h, self.value_gate, v, *mixed)
        if inputs.angles is not None:
            q = op.Rotary.apply(q, *inputs.angles)
            k = op.Rotary.apply(k, *inputs.angles)
        if shape.style == "nanochat":
            q = op.RMSNorm.apply(q, device)
            k = op.RMSNorm.apply(k, device)
        return q, k, v, *mixed

    def projected(self, h: Tensor) -> tuple[Tensor, ...]:
        """What the activation reads, (B, T, M) each: the up projection, before it the gate's."""
        up = self.linear(h, self.up)
        return (up,) if self.gate is None else (self.linear(h, self.gate), up)

    def activated(self, *inner: Tensor) -> Tensor:
        """The style's activation of its inputs, (B, T, M)."""
        function = {"nanochat": op.ReluSquared, "gpt2": op.Gelu, "llama": op.SwiGLU}
        return function[self.shape.style].apply(*inner)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight.T: (..., I), (O, I) -> (..., O); in FP8 only in training."""
        if self.fp8 and self.training:
            return Fp8Linear.apply(x, weight, self.runtime.device)
        return op.Linear.apply(x, weight)

    def dropped(self, y: Tensor) -> Tensor:
        """Dropout on a sublayer's result, only in training."""
        return op.Dropout.apply(y, self.dropout) if self.dropout else y

    @property
    def dropout(self) -> float:
        return self.shape.dropout if self.training else 0.0


class GPT(nn.Module):
    """The model. Weights have torch's default dtype; all between them is in the compute dtype."""

    def __init__(self, shape: ModelShape, runtime: Runtime, compute_dtype: str) -> None:
        super().__init__()
        self.shape, self.runtime, self.dtype = shape, runtime, DTYPES[compute_dtype]
        V, C = shape.padded_vocab_size, shape.model_dim
        learned = shape.style == "gpt2"
        self.embedding = empty(V, C)
        self.positions = empty(shape.context_len, C) if learned else None
        self.blocks = nn.ModuleList(Block(shape, i, runtime) for i in range(shape.num_layers))
        self.norm = None if shape.style == "nanochat" else empty(C)
        self.head = None if shape.tied_embeddings else empty(V, C)
        self.angles = None if learned else rotary_angles(shape, self.dtype)
        self.masks: dict[tuple[int, int], Tensor] = {}
        self.recompute_blocks = False  # the lever `checkpoint = blocks`
        self.loss_scale: LossScale | None = None  # of fp16, in training
        self.around_layer: Callable = stays  # the lever `offload = activations`
        self.ranks: Alone = Alone()  # who else trains this model
        self.calls_blocks = False  # the lever `sharding = full`

    def loss(self, h: Tensor, targets: Tensor, *, chunk: int, scale: float | Tensor) -> Tensor:
        """`scale` x the summed cross-entropy in nats of `hidden`'s rows: (N, C), (B, T) -> ()."""
        return HeadLoss.apply(
            h, self.head_weight, targets.view(-1), self.shape.vocab_size,
            self.shape.logit_softcap, chunk, scale,
        )  # fmt: skip

    def token_losses(self, h: Tensor, targets: Tensor, *, chunk: int) -> Tensor:
        """The cross-entropy of each token in nats, (N,); call under `torch.no_grad`."""
        return token_losses(
            h, self.head_weight, targets.view(-1), self.shape.vocab_size,
            self.shape.logit_softcap, chunk,
        )  # fmt: skip

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) fp32 for the token after `tokens`, which follow what the cache holds."""
        h = self.hidden(tokens, cache)  # (B, C)
        head = self.head_weight[: self.shape.vocab_size].to(h.dtype)
        return capped_logits(h, head, self.shape.logit_softcap)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normed output of the last layer, as rows: (B, T) -> (B * T, C).

        With a cache only the last position of each sequence is returned, (B, C).
        """
        return self.states(tokens, cache).view(-1, self.shape.model_dim)

    def states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The same as (B, T, C); what FSDP2 takes for the forward pass."""
        start = 0 if cache is None else cache.length
        inputs = self.layer_inputs(tokens, cache, start)
        x = self.embedded(tokens, start)
        for block in self.blocks:
            with self.around_layer(block, x):
                if self.recompute_blocks and torch.is_grad_enabled():
                    x = self.recomputed(block, x, inputs)
                elif self.calls_blocks:
                    x = block(x, inputs)
                else:
                    attention, mlp = block.sublayers
                    x = attention(x, inputs)
                    x = mlp(x)
        if cache is not None:
            cache.length += tokens.shape[1]
            x = x[:, -1:]
        return normed(self.shape.style, x, self.norm, self.runtime.device)

    def recomputed(self, block: Block, x: Tensor, inputs: LayerInputs) -> Tensor:
        """Run a block keeping only x; its other tensors are made again in the backward pass."""
        replay_dropout = block.dropout > 0
        return checkpoint(block, x, inputs, use_reentrant=False, preserve_rng_state=replay_dropout)

    def embedded(self, tokens: Tensor, start: int) -> Tensor:
        """What enters the first layer: (B, T) -> (B, T, C)."""
        device = self.runtime.device
        x = op.Embedding.apply(self.embedding, tokens, self.dtype, device)
        if self.shape.style == "nanochat":
            x = op.RMSNorm.apply(x, device)
        if self.positions is not None:
            x = op.Positions.apply(x, self.positions, start)
        dropout = self.shape.dropout if self.training else 0.0
        return op.Dropout.apply(x, dropout) if dropout else x

    def layer_inputs(self, tokens: Tensor, cache: KVCache | None, start: int) -> LayerInputs:
        """Cut the rotary tables and find the masks for `tokens` at position `start`."""
        T = tokens.shape[1]
        angles = None if self.angles is None else tuple(a[start : start + T] for a in self.angles)
        return LayerInputs(tokens, angles, self.window_masks(T, start), cache)

    def window_masks(self, length: int, start: int) -> dict[int | None, Tensor]:
        """One additive mask per window that `length` exceeds, made at its first use and kept.

        Flash attention knows windows by itself; a single token reads a cache that is already cut.
        Several tokens behind a cache need one without a window too, made for this call only.
        """
        if self.runtime.attention == "flash" or length == 1:
            return {}
        if start:
            device, windows = self.embedding.device, {block.window for block in self.blocks}
            return {w: window_mask(length, w, self.dtype, device, start) for w in windows}
        found: dict[int | None, Tensor] = {}
        for window in {block.window for block in self.blocks} - {None}:
            if window < length:
                if (window, length) not in self.masks:
                    device = self.embedding.device
                    mask = window_mask(length, window, self.dtype, device)
                    self.masks[window, length] = mask
                found[window] = self.masks[window, length]
        return found

    @property
    def head_weight(self) -> Tensor:
        """The output projection (V, C): the embedding itself where they are tied."""
        return self.embedding if self.head is None else self.head


def stays(block: Block, x: Tensor) -> AbstractContextManager:
    """What a layer keeps stays on the device."""
    return nullcontext()


def empty(*sizes: int) -> nn.Parameter:
    """A parameter on the default device in the default dtype, its values still to be set."""
    return nn.Parameter(torch.empty(*sizes))


def normed(style: Style, x: Tensor, weight: Tensor | None, device: str) -> Tensor:
    """The style's norm over the channels."""
    if style == "gpt2":
        return op.LayerNorm.apply(x, weight)
    if weight is None:
        return op.RMSNorm.apply(x, device)
    return op.WeightedRMSNorm.apply(x, weight, device)


def rotary_angles(shape: ModelShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x frequency, (context, 1, D / 2) each (arXiv 2104.09864)."""
    channels = torch.arange(0, shape.head_dim, 2, dtype=torch.float32)
    frequency = ROPE_BASE[shape.style] ** (-channels / shape.head_dim)
    angle = torch.outer(torch.arange(shape.context_len, dtype=torch.float32), frequency)
    return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)

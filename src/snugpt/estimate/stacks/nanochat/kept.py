"""What nanochat's compiled micro-step keeps for backward, by version: a table.

Bytes per token are `per_channel * C + per_head * H + per_token`; C channels, H heads. The sums were
read from the plan that Inductor makes for CUDA when the unmodified models are compiled (PyTorch 2.8
and 2.9.1, 15 models from 2 to 32 layers, agreement 0.9995 to 1.0000; no GPU ran). Which tensors a
sum is made of follows from what backward reads; their names are ours.

    bf16   October 36 C a layer, February 39 C, from 14 March 37 C   (+ 12 H + 8)
    FP8    from 14 March 26.5 C
    eager  from 14 March 38 C + VE

The eager row is what autograd saves, operation by operation. Value embeddings are kept in every
other layer, so 2 C there is 1 C on average.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from snugpt.estimate.stacks.nanochat.versions import Version

Where = Literal["every", "mixing", "plain", "not first"]  # mixing: with a value embedding


class Kept(NamedTuple):
    """One tensor that is kept per token, in which layers, and what it holds in words."""

    name: str
    per_channel: int = 0
    per_head: int = 0
    per_token: int = 0
    where: Where = "every"


_QKV = (
    Kept("rotated queries", per_channel=2),
    Kept("rotated keys", per_channel=2),
    Kept("queries", per_channel=2),
    Kept("keys", per_channel=2),
    Kept("values", per_channel=2),
    Kept("norm statistics", per_head=8),  # fp32, of queries and keys
    Kept("attention outputs", per_channel=2),
    Kept("attention statistics", per_head=4),  # fp32 log-sum-exp
)
_VALUE_EMBEDDING = (
    Kept("value embeddings", per_channel=2, where="mixing"),
    Kept("value gates", per_head=2, where="mixing"),
)
# The stream before the layer's factors; the first layer's is a multiple of its input.
_SCALED = (Kept("scaled stream", per_channel=2, where="not first"),)
_STREAM = Kept("residual stream", per_channel=2)
_NORM = Kept("norm statistics", per_token=4)

_BF16_LAYER = (
    _STREAM,
    _NORM,
    Kept("norm outputs", per_channel=2),
    *_QKV,
    _STREAM,
    _NORM,
    Kept("norm outputs", per_channel=2),
    Kept("mlp inputs", per_channel=8),
    Kept("mlp activations", per_channel=8),
)
# The squared activation and the MLP's input are computed again. Queries, keys and values share one
# FP8 copy of their input, but a value gate reads channels of it and so it stays whole in bf16.
_FP8_LAYER = (
    _STREAM,
    _NORM,
    Kept("norm outputs", per_channel=1, where="plain"),
    Kept("norm outputs", per_channel=2, where="mixing"),
    *_QKV,
    _STREAM,
    _NORM,
    Kept("mlp inputs", per_channel=8),
)
_EDGE = (
    Kept("residual stream", per_channel=2),  # behind the last layer
    Kept("norm statistics", per_token=8),  # of the embedding and of the last norm
    Kept("loss statistics", per_token=8),  # fp32: largest logit and log-sum-exp
)
_LAST_NORM = Kept("norm outputs", per_channel=2)
_BEFORE_SMEAR = Kept("embeddings", per_channel=2)


EAGER_LAYER = (
    _STREAM,
    Kept("scaled stream", per_channel=2),
    _NORM,
    Kept("norm outputs", per_channel=2),
    Kept("value embeddings", per_channel=2, where="mixing"),
    Kept("value gates", per_head=4, where="mixing"),  # the sigmoid, and three times it
    *_QKV,
    _STREAM,
    _NORM,
    Kept("norm outputs", per_channel=2),
    Kept("mlp activations", per_channel=8),  # the ReLU
    Kept("mlp activations", per_channel=8),  # and its square
)
EAGER_EDGES = (
    Kept("embeddings", per_channel=4),  # before and after the norm; the latter for the smear
    Kept("smear gate", per_token=52),  # its 24 input channels, its sigmoid, and that scaled
    Kept("residual stream", per_channel=2),  # behind the last layer, the middle one taken out
    Kept("norm statistics", per_token=8),
    _LAST_NORM,
)
# Where the middle layer is the last: its output, which is else the next layer's input.
EAGER_EDGES_SHALLOW = (Kept("residual stream", per_channel=2),)


def kept_by_layer(version: Version, fp8: bool) -> tuple[Kept, ...]:
    """Return what one layer keeps, in the order in which forward makes it."""
    layer = _FP8_LAYER if fp8 else _BF16_LAYER
    if not version.value_embeddings:
        return layer
    if version.smear_channels:
        return _VALUE_EMBEDDING + layer
    return _SCALED + _VALUE_EMBEDDING + layer


def kept_at_edges(version: Version, fp8: bool) -> tuple[Kept, ...]:
    """Return what is kept outside the layers; the head's input in FP8 is computed again."""
    edges = _EDGE if fp8 else (*_EDGE, _LAST_NORM)
    return (_BEFORE_SMEAR, *edges) if version.smear_channels else edges


def logits_bytes(fp8: bool) -> dict[str, int]:
    """Return the bytes per logit that are alive where the head's backward begins, by name.

    bf16: the gradient is written over the logits. FP8: beside them lie the gradient in fp32, its
    copy in e5m2 and that copy's transpose.
    """
    if not fp8:
        return {"logits": 2}
    return {"logits": 2, "logit gradients": 4, "FP8 logit gradients": 2}

"""ModelShape: what fixes the size of a GPT, and nothing about how it is trained.

One dial, `depth`, sets every field for a style; any single field can be pinned instead. Three
styles:

    nanochat   RMSNorm without weights, rotary, QK norm, relu squared, untied, value embeddings on
               every other layer, sliding windows, logit soft cap
    llama      RMSNorm with weights, rotary, SwiGLU, grouped-query attention, untied
    gpt2       LayerNorm, learned positions, GELU, dropout, tied
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from snugpt.errors import BadQuestionError, bad_value
from snugpt.units import round_up

Style = Literal["nanochat", "llama", "gpt2"]
ParameterGroup = Literal[
    "embedding", "value_embedding", "head", "matrices", "norms", "scalars", "encoder"
]

STYLES: tuple[Style, ...] = get_args(Style)
HEAD_DIM: dict[Style, int] = {"nanochat": 128, "llama": 64, "gpt2": 64}
VOCAB_SIZE: dict[Style, int] = {"nanochat": 32768, "llama": 32768, "gpt2": 50304}
WINDOW_PATTERN: dict[Style, str] = {"nanochat": "SSSL", "llama": "L", "gpt2": "L"}
ROPE_BASE: dict[Style, float] = {"nanochat": 100_000.0, "llama": 10_000.0}
GATE_CHANNELS = 12  # a value gate reads the first channels of its layer's input
VOCAB_MULTIPLE = 64  # rows of the embedding are padded to this, so that matmul tiles stay whole
WINDOW_MULTIPLE = 128  # a short window is a quarter of the context, rounded up to attention tiles


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sizes of one GPT. Widths in channels, lengths in tokens."""

    style: Style
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    padded_vocab_size: int
    context_len: int
    window_pattern: str
    tied_embeddings: bool
    value_embeddings: bool
    logit_softcap: float | None
    dropout: float

    def __post_init__(self) -> None:
        for field, highest in _LIMITS.items():
            value = getattr(self, field)
            if not 1 <= value <= highest:
                raise bad_value(field, value, f"1 to {highest}", hint="snugpt plan --depth 12")
        if self.num_heads * self.head_dim != self.model_dim:
            raise BadQuestionError(
                f"num_heads = {self.num_heads} does not divide model_dim = {self.model_dim}"
                f" into heads of {self.head_dim}",
                hint=f"snugpt plan --width {self.model_dim} --heads {_nearest_heads(self)}",
            )
        if self.num_heads % self.num_kv_heads:
            raise BadQuestionError(
                f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}",
                hint=f"snugpt plan --heads {self.num_heads} --kv-heads 1",
            )
        if self.head_dim % 2 and self.style != "gpt2":
            raise bad_value("head_dim", self.head_dim, "an even number, rotary turns pairs")
        if self.value_embeddings and self.model_dim < GATE_CHANNELS:
            raise bad_value(
                "model_dim", self.model_dim, f"at least {GATE_CHANNELS} for value gates"
            )
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise bad_value("window_pattern", self.window_pattern, "letters S (short) and L (long)")
        if not 0.0 <= self.dropout < 1.0:  # also refuses NaN
            raise bad_value("dropout", self.dropout, "0 to below 1", hint="snugpt plan --dropout 0")
        if self.logit_softcap is not None and not 0.0 < self.logit_softcap < 1e6:
            raise bad_value("logit_softcap", self.logit_softcap, "above 0, below 1e6")
        if self.padded_vocab_size < self.vocab_size:
            raise bad_value("padded_vocab_size", self.padded_vocab_size, "at least vocab_size")

    @property
    def kv_dim(self) -> int:
        """Channels of the keys (and of the values) of one token in one layer."""
        return self.num_kv_heads * self.head_dim

    def has_value_embedding(self, layer: int) -> bool:
        """Whether `layer` mixes a value embedding in: every other one, the last included."""
        return self.value_embeddings and layer % 2 == (self.num_layers - 1) % 2

    def window_tokens(self, layer: int) -> int | None:
        """How many tokens back `layer` sees, itself included; None where it sees the whole context.

        The pattern is tiled over the layers and the last layer is always long. A short window is a
        quarter of the context rounded up to 128 (nanochat, July 2026); one that covers the context
        is long.
        """
        if layer == self.num_layers - 1:
            return None
        if self.window_pattern[layer % len(self.window_pattern)] == "L":
            return None
        window = round_up(-(-self.context_len // 4), WINDOW_MULTIPLE)
        return window if window < self.context_len else None


_LIMITS = {
    "num_layers": 1024,
    "model_dim": 65536,
    "num_heads": 1024,
    "num_kv_heads": 1024,
    "head_dim": 1024,
    "mlp_dim": 1 << 20,
    "vocab_size": 1 << 24,
    "padded_vocab_size": 1 << 24,
    "context_len": 1 << 24,
}


def shape_for(
    style: Style,
    depth: int,
    *,
    context_len: int = 2048,
    width: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    mlp: int | None = None,
    vocab_size: int | None = None,
    tie: bool | None = None,
    dropout: float | None = None,
    window_pattern: str | None = None,
) -> ModelShape:
    """Return the shape at `depth` of `style`'s dial, with single fields pinned.

    The dial: layers = depth, width = 64 x depth rounded up to the head size; nanochat: head 128;
    llama: head 64, kv heads = heads / 4, mlp = 8/3 width rounded up to 256; gpt2: head 64, mlp 4 x.

    Raises:
        BadQuestionError: a field is out of range or the heads do not divide the width.
    """
    if style not in STYLES:
        raise bad_value("style", style, "one of " + ", ".join(STYLES), hint="snugpt plan --help")
    if not 1 <= depth <= _LIMITS["num_layers"]:
        raise bad_value(
            "depth", depth, f"1 to {_LIMITS['num_layers']}", hint="snugpt plan --depth 12"
        )
    head_dim = _head_dim(style, width, heads)
    model_dim = round_up(64 * depth, head_dim) if width is None else width
    num_heads = heads if heads is not None else max(1, model_dim // head_dim)
    vocabulary = VOCAB_SIZE[style] if vocab_size is None else vocab_size
    nanochat = style == "nanochat"
    return ModelShape(
        style=style,
        num_layers=depth,
        model_dim=model_dim,
        num_heads=num_heads,
        num_kv_heads=kv_heads if kv_heads is not None else _kv_heads(style, num_heads),
        head_dim=model_dim // num_heads if heads else head_dim,
        mlp_dim=mlp if mlp is not None else _mlp_dim(style, model_dim),
        vocab_size=vocabulary,
        padded_vocab_size=round_up(vocabulary, VOCAB_MULTIPLE),
        context_len=context_len,
        window_pattern=WINDOW_PATTERN[style] if window_pattern is None else window_pattern,
        tied_embeddings=(style == "gpt2") if tie is None else tie,
        value_embeddings=nanochat,
        logit_softcap=15.0 if nanochat else None,
        dropout=0.0 if dropout is None else dropout,
    )


def default_vocab_size(style: Style, corpus_bytes: int | None) -> int:
    """Return the entries a tokenizer trained on the user's text gets: small text, small vocabulary.

    2048 below 4 MB of text, 8192 below 100 MB, else the style's own; None when no text is given.
    """
    if corpus_bytes is None or corpus_bytes >= 100_000_000:
        return VOCAB_SIZE[style]
    return 2048 if corpus_bytes < 4_000_000 else 8192


def _head_dim(style: Style, width: int | None, heads: int | None) -> int:
    """The style's head size, or the largest smaller power of two that divides a pinned width."""
    if width is None or heads is not None:
        return HEAD_DIM[style]
    divisors = (size for size in (HEAD_DIM[style], 64, 32, 16) if width % size == 0)
    return next(divisors, HEAD_DIM[style])


def _kv_heads(style: Style, num_heads: int) -> int:
    """Key and value heads: a quarter of the heads in llama, as many as heads elsewhere."""
    if style != "llama" or num_heads < 1:
        return num_heads
    return next(n for n in range(max(1, num_heads // 4), 0, -1) if num_heads % n == 0)


def _mlp_dim(style: Style, model_dim: int) -> int:
    return round_up(-(-8 * model_dim // 3), 256) if style == "llama" else 4 * model_dim


def _nearest_heads(shape: ModelShape) -> int:
    """The number of heads nearest to the one asked for that divides the width into even sizes."""
    fits = (n for n in range(1, shape.model_dim + 1) if shape.model_dim % (2 * n) == 0)
    return min(fits, key=lambda n: abs(n - shape.num_heads), default=1)

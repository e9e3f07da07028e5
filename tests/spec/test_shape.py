"""The dial and its pins: sizes by the rules of each style, and what can't be is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snugpt.errors import BadQuestionError
from snugpt.spec.shape import STYLES, Style, default_vocab_size, shape_for


@pytest.mark.parametrize(
    ("style", "depth", "expected"),
    [  # layers, width, heads, kv heads, mlp, vocabulary
        ("nanochat", 12, (12, 768, 6, 6, 3072, 32768)),
        ("nanochat", 11, (11, 768, 6, 6, 3072, 32768)),  # 704 rounded up to heads of 128
        ("nanochat", 20, (20, 1280, 10, 10, 5120, 32768)),
        ("llama", 12, (12, 768, 12, 3, 2048, 32768)),
        ("llama", 2, (2, 128, 2, 1, 512, 32768)),
        ("gpt2", 12, (12, 768, 12, 12, 3072, 50304)),
    ],
)
def test_the_dial_sets_every_size(style: Style, depth: int, expected: tuple[int, ...]) -> None:
    shape = shape_for(style, depth)
    sizes = (shape.num_layers, shape.model_dim, shape.num_heads, shape.num_kv_heads)
    assert (*sizes, shape.mlp_dim, shape.vocab_size) == expected


@pytest.mark.parametrize(
    ("style", "num_bytes", "entries"),
    [
        ("nanochat", None, 32768),
        ("nanochat", 3_999_999, 2048),
        ("nanochat", 4_000_000, 8192),
        ("nanochat", 99_999_999, 8192),
        ("nanochat", 100_000_000, 32768),
        ("gpt2", 100_000_000, 50304),
    ],
)
def test_a_small_text_gets_a_small_vocabulary(
    style: Style, num_bytes: int | None, entries: int
) -> None:
    assert default_vocab_size(style, num_bytes) == entries


@pytest.mark.parametrize(
    ("pins", "named"),
    [
        ({"width": 512, "heads": 5}, "num_heads"),
        ({"heads": 6, "kv_heads": 4}, "num_kv_heads"),
        ({"window_pattern": "SX"}, "window_pattern"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_what_cannot_be_is_refused_by_name(pins: dict[str, object], named: str) -> None:
    with pytest.raises(BadQuestionError, match=named):
        shape_for("nanochat", 12, **pins)  # type: ignore[arg-type]


def test_window_is_a_quarter_of_the_context_in_tiles_and_the_last_layer_sees_all() -> None:
    shape = shape_for("nanochat", 8, context_len=2048)
    windows = [shape.window_tokens(layer) for layer in range(8)]
    assert windows == [512, 512, 512, None, 512, 512, 512, None]
    assert shape_for("nanochat", 8, context_len=128).window_tokens(0) is None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(STYLES),
    st.integers(1, 64),
    st.none() | st.integers(1, 4096),
    st.none() | st.integers(1, 64),
    st.none() | st.integers(1, 64),
)
def test_a_shape_holds_together_or_is_refused(
    style: Style, depth: int, width: int | None, heads: int | None, kv_heads: int | None
) -> None:
    try:
        shape = shape_for(style, depth, width=width, heads=heads, kv_heads=kv_heads)
    except BadQuestionError:
        return
    assert shape.num_heads * shape.head_dim == shape.model_dim
    assert shape.num_heads % shape.num_kv_heads == 0
    assert shape.padded_vocab_size % 64 == 0
    assert width in (None, shape.model_dim)

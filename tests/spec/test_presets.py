"""The presets are the guide's table, and the dial's are the dial."""

from __future__ import annotations

import pytest

from snugpt.errors import BadQuestionError
from snugpt.planner.subject import settled, shape_of
from snugpt.spec.presets import preset_fields, presets
from snugpt.spec.question import Question
from snugpt.spec.shape import shape_for

# As the guide prints it: layers, heads, width, context, batch, vocabulary
GUIDE = """
tiny       4  4  192  128 16 50304
tiny_char  4  4  192  128 16 256
small      6  6  384  256 32 50304
small_char 6  6  384  256 32 256
150M      16 12  768  256 32 50304
200M      16 14  896  256 32 50304
250M      16 16 1024  256 32 50304
150M_1024 16 12  768 1024 24 50304
200M_1024 16 14  896 1024 20 50304
250M_1024 16 16 1024 1024 16 50304
350M_1024 24 16 1024 1024 12 50304
500M_1024 24 16 1280 1024  8 50304
"""
ROWS = [line.split() for line in GUIDE.strip().splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_preset_is_the_guides_row(row: list[str]) -> None:
    layers, heads, width, context, batch, vocabulary = map(int, row[1:])
    question = settled(Question(preset=row[0]))
    shape = shape_of(question, layers, None)
    assert (shape.num_layers, shape.num_heads, shape.model_dim) == (layers, heads, width)
    assert (shape.context_len, shape.vocab_size) == (context, vocabulary)
    assert (shape.style, shape.tied_embeddings, shape.dropout) == ("gpt2", True, 0.2)
    assert (shape.num_kv_heads, shape.mlp_dim) == (heads, 4 * width)
    assert (question.batch_size, question.optimizer) == (batch, "adamw")
    assert bool(question.byte_tokens) == row[0].endswith("_char")


def test_no_other_presets_but_the_dials() -> None:
    dial = [f"d{depth}" for depth in range(4, 33, 2)]
    assert list(presets()) == [row[0] for row in ROWS] + dial


def test_a_preset_of_the_dial_is_the_depth() -> None:
    question = settled(Question(preset="d20"))
    assert shape_of(question, 20, None) == shape_for("nanochat", 20)


@pytest.mark.parametrize("spelling", ["150M_1024", "150m-1024", " 150M-1024 "])
def test_case_and_hyphens_do_not_count(spelling: str) -> None:
    assert preset_fields(spelling) == presets()["150M_1024"]


def test_a_misspelt_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(BadQuestionError, match="did you mean 'tiny_char'"):
        preset_fields("tiny_chr")


def test_a_preset_gives_way_to_the_rule_for_the_users_text() -> None:
    with_text = settled(Question(preset="tiny", input="my.txt"))
    assert shape_of(with_text, 4, 1_000_000).vocab_size == 2048
    bytes_ = settled(Question(preset="tiny_char", input="my.txt"))
    assert shape_of(bytes_, 4, 1_000_000).vocab_size == 256

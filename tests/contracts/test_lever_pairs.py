"""Predicted, traced and real memory with every pair of levers pulled together."""

from __future__ import annotations

import pytest
from lever_pairs import axes_of, covering, pairs_of
from recorder import cpu_runtime
from test_traced_cpu import real_events, traced_events
from test_traced_memory import assert_agree, both

from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, ModelShape, shape_for

CARDS = {
    "bf16": Runtime(device="cuda", attention="flash", capability=(9, 0)),
    "fp16": Runtime(device="cuda", attention="efficient", capability=(7, 5)),
    "fp32": Runtime(device="cuda", attention="efficient", capability=(6, 1)),
}


def small(style: str) -> ModelShape:
    return shape_for(style, 2, context_len=160, width=64, heads=4, kv_heads=2, vocab_size=704)


@pytest.mark.parametrize("dtype", CARDS)
@pytest.mark.parametrize("style", STYLES)
def test_with_every_pair_of_levers_what_is_predicted_is_traced(style, dtype):
    shape = small(style)
    for recipe, _ in covering(shape, CARDS[dtype], dtype):
        assert_agree(both(shape, recipe, CARDS[dtype]))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("style", STYLES)
def test_with_every_pair_of_levers_what_is_traced_is_real(style):
    shape = small(style)
    for recipe, _ in covering(shape, cpu_runtime(shape), "fp32"):
        assert traced_events(shape, recipe) == real_events(shape, recipe)


def test_every_pair_that_is_not_refused_is_covered_once():
    shape, card = small("llama"), CARDS["bf16"]
    found = [pair for _, new in covering(shape, card, "bf16") for pair in new]
    assert len(found) == len(set(found))
    assert set(found) <= pairs_of(axes_of(shape))
    assert len(found) > 50

"""Predicted, traced and real memory with every pair of levers pulled together."""

from __future__ import annotations

import pytest
from lever_pairs import axes, covering, pairs_of, small
from recorder import cpu_runtime
from test_traced_cpu import real_events, traced_events
from test_traced_memory import assert_agree, both

from snugpt.spec.runtime import Runtime

CARDS = {
    "bf16": Runtime(device="cuda", attention="flash", capability=(9, 0)),
    "fp16": Runtime(device="cuda", attention="efficient", capability=(7, 5)),
}


@pytest.mark.parametrize("dtype", CARDS)
def test_with_every_pair_of_levers_what_is_predicted_is_traced(dtype):
    for (shape, recipe), _ in covering(CARDS[dtype], dtype):
        assert_agree(both(shape, recipe, CARDS[dtype]))


@pytest.mark.usefixtures("one_thread")
def test_with_every_pair_of_levers_what_is_traced_is_real():
    for (shape, recipe), _ in covering(cpu_runtime(small("llama")), "fp32"):
        assert traced_events(shape, recipe) == real_events(shape, recipe)


def test_every_pair_that_is_not_refused_is_covered_once():
    found = [pair for _, new in covering(CARDS["bf16"], "bf16") for pair in new]
    assert len(found) == len(set(found))
    assert set(found) <= pairs_of(axes())
    assert len(found) > 250

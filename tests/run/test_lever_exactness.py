"""bench/lever_exactness.py in short: what each lever does to the loss beside the plain fp32 run."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from msgspec.structs import replace

from snugpt.estimate.stacks.catalogue import SNUGPT
from snugpt.planner.pulled import PULLED

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
bench, lever_cases = (import_module(name) for name in ("lever_exactness", "lever_cases"))

# The first documents of the built-in corpus: reading all of it takes seconds.
TEXT = np.frombuffer("\0".join(topics.values()).encode(), dtype=np.uint8)
SMALL = {"steps": 4, "layers": 2, "width": 64, "seq_len": 32, "batch": 4, "processes": False}


@pytest.fixture(scope="module")
def found():
    return bench.compare("nanochat", tokens=TEXT, **SMALL)


def test_exact_levers_are_the_plain_run_or_within_the_order_of_its_sums(found) -> None:
    assert found.broken == []
    identical = {r.case.name for r in found.results if r.identical}
    made_again = {r.case.name for r in found.results if r.case.name.startswith("checkpoint")}
    assert made_again
    assert made_again <= identical
    assert 0.0 < found.reordered < 1e-4


def test_levers_that_are_not_exact_differ_less_than_seeds_do(found) -> None:
    inexact = [result for result in found.results if not result.case.exact]
    assert inexact
    for result in inexact:
        assert 0.0 < result.final < found.spread, result.case.name


def test_every_value_of_every_lever_is_trained_or_refused_by_name(found) -> None:
    tried = [result.case for result in found.results] + list(found.refused)
    for lever in PULLED:
        for value in SNUGPT.levers[lever]:
            plain = getattr(found.results[0].case.beside, lever) == value
            assert plain or any(getattr(c.recipe, lever) == value for c in tried), (lever, value)


def test_a_lever_that_claims_to_be_exact_and_is_not_is_named() -> None:
    plain = lever_cases.plain_recipe(32, 4, 6)
    case = lever_cases.Case("lies", replace(plain, compute_dtype="bf16"), plain, True)
    shape = bench.shape_for("nanochat", 1, width=64, heads=2, context_len=32, vocab_size=256)
    curves = [[bench.curve(shape, recipe, TEXT, 0)] for recipe in (case.recipe, plain)]
    assert bench.beside(case, *curves).verdict(reordered=1e-6, spread=1.0) == "NOT EXACT"

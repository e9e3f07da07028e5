"""More of anything needs no less memory, on random questions over every kernel and lever."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from training_questions import RUNTIMES, question

from snugpt.estimate.levers import why_not
from snugpt.estimate.making_again import selective_sets
from snugpt.estimate.training import CPU_RANDOM_STATE_BYTES, TrainingStep
from snugpt.spec.shape import STYLES, shape_for

NUM_QUESTIONS = 700  # for each of batch, seq_len and depth


def random_questions(seed: int, count: int = NUM_QUESTIONS) -> Iterator[tuple[dict[str, Any], int]]:
    draw = random.Random(seed)
    for _ in range(count):
        style, runtime = draw.choice(STYLES), draw.choice(sorted(RUNTIMES))
        drops = style == "gpt2" and runtime != "cpu" and draw.random() < 0.5
        asked = {
            "style": style,
            "runtime": runtime,
            "depth": draw.randint(1, 6),
            "width": 64 * draw.randint(1, 8),
            "seq_len": draw.randint(1, 1500),
            "vocab_size": draw.choice([300, 4096, 32768]),
            "tie": draw.random() < 0.5,
            "dropout": 0.1 if drops else 0.0,
            "optimizer": draw.choice(["muon", "adamw"]),
            "checkpoint": draw.choice(["none", "blocks"]),
            "loss": draw.choice(["chunked", "plain"]),
            "accumulation": draw.choice([1, 4]),
        }
        yield asked, draw.randint(1, 32)


def requested_bytes(asked: dict[str, Any], batch: int) -> int:
    return TrainingStep(*question(asked, batch)).timeline().read(batch, workspace=False)[0].bytes


def test_a_larger_batch_needs_more():
    for asked, batch in random_questions(1):
        assert requested_bytes(asked, batch + 1) >= requested_bytes(asked, batch), (asked, batch)


@pytest.mark.parametrize(("field", "step"), [("seq_len", 1), ("seq_len", 130), ("depth", 1)])
def test_longer_sequences_and_more_layers_need_more(field, step):
    for asked, batch in random_questions(step):
        larger = asked | {field: asked[field] + step}
        assert requested_bytes(larger, batch) >= requested_bytes(asked, batch), (asked, batch)


def test_checkpointed_blocks_need_no_more_but_for_the_random_states_of_dropout():
    for asked, batch in random_questions(5):
        deep = asked | {"depth": asked["depth"] + 1}
        none = requested_bytes(deep | {"checkpoint": "none"}, batch)
        states = CPU_RANDOM_STATE_BYTES * (deep["depth"] + 1) if deep["dropout"] else 0
        blocks = requested_bytes(deep | {"checkpoint": "blocks"}, batch)
        assert blocks <= none + states, (deep, batch)


def selective(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The question with each set of steps that its device has, cheapest first."""
    for steps in selective_sets(shape_for(asked["style"], 2)):
        levers = asked | {"checkpoint": "selective", "selective_steps": steps}
        if why_not(*question(levers)) is None:
            yield levers


def test_making_tensors_again_needs_no_more():
    for asked, batch in random_questions(6, 150):
        deep = asked | {"depth": asked["depth"] + 1}
        none = requested_bytes(deep | {"checkpoint": "none"}, batch)
        for levers in selective(deep):
            assert requested_bytes(levers, batch) <= none, (levers, batch)


def test_evaluation_never_needs_more_than_training():
    draw = random.Random(7)
    for asked, batch in random_questions(7, 250):
        chosen = draw.choice([asked, *selective(asked)])
        compiled = asked | {"checkpoint": "none", "compile": "on"}
        for each in (chosen, compiled):
            hands_on_early = each | {"accumulation": 1, "clip_norm": 0.0}
            for levers in (each, hands_on_early):
                shape, recipe, runtime = question(levers, batch)
                if why_not(shape, recipe, runtime) is None:
                    _, phases = TrainingStep(shape, recipe, runtime).timeline().read(batch)
                    evaluate = phases.pop("evaluate")
                    assert evaluate <= max(phases.values()), (levers, batch)

"""The picture of a plan: named after it, held against its card and against another source."""

from __future__ import annotations

import pytest

from snugpt.estimate.memory import runtime_of, timeline_of
from snugpt.planner.answer import plan
from snugpt.planner.picturing import picture_of, title_of
from snugpt.units import gib


@pytest.mark.parametrize(
    ("asked", "title"),
    [
        (
            {"depth": 4, "device_batch_size": 4},
            "Train nanochat, 4 layers, 36.7M parameters, on NVIDIA GeForce RTX 4090:"
            " 4 x 2048 tokens",
        ),
        (
            {"depth": 4, "task": "generate", "style": "llama"},
            "Generate with llama, 4 layers, 19.8M parameters, on NVIDIA GeForce RTX 4090:"
            " 1 x 512 + 256 tokens",
        ),
    ],
)
def test_a_picture_is_named_after_its_plan(asked: dict[str, object], title: str) -> None:
    made = plan(gpu="rtx-4090", **asked)
    assert title_of(made) == title
    picture = picture_of(made)
    assert f"<title>{title}</title>" in picture
    assert f"Capacity {gib(made.memory.capacity_bytes)}." in picture
    assert f"to {gib(made.memory.process_bytes.high)}." in picture


def test_another_source_of_the_same_step_is_drawn_over_it() -> None:
    made = plan(gpu="rtx-4090", depth=2, task="generate", batch=1)
    runtime = runtime_of(made.shape, made.recipe, made.gpu, 1)
    same = timeline_of(made.shape, made.recipe, runtime)
    picture = picture_of(made, same, measured_label="recorded")
    assert "predicted ÷ recorded 1.0000" in picture
    assert "recorded" not in picture_of(made)

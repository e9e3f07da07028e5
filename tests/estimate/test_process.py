"""The bands of reserved and process: wide enough for what they are said to rest on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from training_questions import question

from snugpt.estimate.process import (
    CONTEXT_BYTES,
    EXPANDABLE_FACTOR,
    RESERVED_FACTOR,
    RESERVED_REST_BYTES,
    process_band,
    reserved_band,
)
from snugpt.estimate.simulation import simulate
from snugpt.estimate.training import TrainingStep
from snugpt.spec.memory import BytesBand
from snugpt.spec.runtime import Runtime
from snugpt.units import GIB

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "reserved_band.txt"
CUDA = Runtime(device="cuda", attention="flash", capability=(9, 0))


def figures(name: str) -> list[float]:
    """The figures of one line of the committed results."""
    (line,) = re.findall(rf"^{re.escape(name)} +([\d. ]+)$", RESULTS.read_text(), re.MULTILINE)
    return [float(each) for each in line.split()]


def test_a_tenth_holds_every_published_pair_of_a_compiled_run_on_one_card() -> None:
    pairs, lowest, _, highest = figures("compiled, parameter-golf, 1 GPU, one shape")
    assert pairs >= 5
    assert 1 <= lowest <= highest < RESERVED_FACTOR


@pytest.mark.parametrize("expandable", [False, True])
def test_an_eager_band_is_from_allocated_to_a_tenth_above_the_simulation(expandable: bool) -> None:
    shape, recipe, runtime = question(
        {"style": "nanochat", "runtime": "flash", "depth": 2, "seq_len": 256}
    )
    timeline = TrainingStep(shape, recipe, runtime).timeline()
    band, allocated = reserved_band(timeline, 4, runtime, 0, expandable=expandable)
    simulated = simulate(timeline, 4, expandable=expandable)
    assert (band.low, band.expected) == (simulated.allocated_bytes, simulated.reserved_bytes)
    assert allocated == band.low
    factor = EXPANDABLE_FACTOR if expandable else RESERVED_FACTOR
    assert band.high == int(band.expected * factor) + RESERVED_REST_BYTES


def test_the_native_band_holds_every_variation_of_the_simulated_steps() -> None:
    """The largest came of the smallest steps, of 0.8 GiB and more."""
    assert figures("native")[-1] <= RESERVED_FACTOR + RESERVED_REST_BYTES / (1.15 * GIB)


def test_a_process_is_reserved_and_a_context() -> None:
    band = process_band(BytesBand(low=1, expected=2, high=3), CUDA, CONTEXT_BYTES)
    assert (band.low, band.high) == (1 + CONTEXT_BYTES.low, 3 + CONTEXT_BYTES.high)
    assert band.expected == 2 + CONTEXT_BYTES.expected

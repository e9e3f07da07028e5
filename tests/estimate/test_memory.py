"""MemoryEstimate: what is printed adds up, for any question about training and generation."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_questions import levers, question

from snugpt.estimate.memory import (
    batch_of,
    memory_estimate,
    peak_bytes,
    runtime_of,
    timeline_of,
)
from snugpt.estimate.process import highest_process_bytes
from snugpt.spec.gpu import Gpu
from snugpt.spec.memory import MemoryEstimate
from snugpt.spec.recipe import GenerationRecipe, Recipe
from snugpt.spec.shape import ModelShape, shape_for
from snugpt.units import GIB, MIB

HOPPER = Gpu(
    id="h100", name="H100", backend="cuda", memory_bytes=80 * GIB, usable_bytes=79 * GIB,
    bandwidth_bytes_per_s=3e12, flops={"fp32": 6e13, "bf16": 9e14}, capability=(9, 0),
)  # fmt: skip
PASCAL = msgspec.structs.replace(HOPPER, id="gtx-1070", capability=(6, 1), flops={"fp32": 6e12})
PROCESSOR = msgspec.structs.replace(HOPPER, id="cpu", backend="cpu", capability=None)


@st.composite
def generation(draw, shape: ModelShape) -> GenerationRecipe:
    prompt = draw(st.integers(1, shape.context_len - 1))
    return GenerationRecipe(
        batch=draw(st.integers(1, 40)), prompt_tokens=prompt,
        max_new_tokens=draw(st.integers(1, shape.context_len - prompt)),
        kv_dtype=draw(st.sampled_from(["fp32", "bf16"])),
        weight_dtype=draw(st.sampled_from(["fp32", "bf16"])),
    )  # fmt: skip


@st.composite
def asked(draw) -> tuple[ModelShape, Recipe, Gpu]:
    """Any question the house can be asked about a step or about an answer."""
    shape, recipe, runtime = question(draw(levers(lengths=(64, 100, 256))) | {"chunk": 64})
    gpu = PROCESSOR if runtime.device == "cpu" else draw(st.sampled_from([HOPPER, PASCAL]))
    if draw(st.booleans()):
        return shape, draw(generation(shape)), gpu
    batch = draw(st.integers(1, 40))
    recipe = msgspec.structs.replace(
        recipe, device_batch_size=batch, total_batch_tokens=recipe.total_batch_tokens * batch
    )
    return shape, recipe, gpu


@settings(max_examples=200, deadline=None, derandomize=True)
@given(asked(), st.integers(1, 8))
def test_any_estimate_adds_up(asked, num_threads: int) -> None:
    shape, recipe, gpu = asked
    found = memory_estimate(shape, recipe, gpu, num_threads=num_threads)
    assert sum(term.bytes for term in found.terms) == found.allocated_bytes
    assert max(found.phases.values()) == found.requested_bytes
    assert found.requested_bytes <= found.allocated_bytes <= found.reserved_bytes.expected
    for band in (found.reserved_bytes, found.process_bytes):
        assert 0 < band.low <= band.expected <= band.high
    assert found.process_bytes.low > found.reserved_bytes.low
    assert found.headroom_bytes == gpu.usable_bytes - found.process_bytes.high
    assert found.peak_phase in found.phases
    check_terms(found, gpu)


def check_terms(found: MemoryEstimate, gpu: Gpu) -> None:
    names = [term.name for term in found.terms]
    assert len(set(names)) == len(names)
    assert all(term.bytes > 0 and term.formula for term in found.terms)
    sizes = [term.bytes for term in found.terms if term.category != "slack"]
    assert sizes == sorted(sizes, reverse=True)
    if gpu is HOPPER:  # kernels' scratch is allocated, not requested, and cuBLAS's is always there
        assert found.requested_bytes <= found.allocated_bytes - 32 * MIB
    if gpu.backend == "cpu":
        assert found.reserved_bytes.low == found.reserved_bytes.high == found.allocated_bytes
        assert not any(term.category == "slack" for term in found.terms)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(asked())
def test_the_quick_peak_is_the_printed_one_or_a_little_above(asked) -> None:
    shape, recipe, gpu = asked
    found = memory_estimate(shape, recipe, gpu)
    runtime = runtime_of(shape, recipe, gpu, 1)
    quick = peak_bytes(shape, recipe, runtime)
    alive, _ = timeline_of(shape, recipe, runtime).read(batch_of(recipe))
    assert alive.bytes <= quick <= 1.05 * alive.bytes + 2**20
    quickly = highest_process_bytes(found.allocated_bytes, runtime, recipe)
    assert quickly <= found.process_bytes.high + 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(asked())
def test_a_larger_batch_never_takes_less(asked) -> None:
    shape, recipe, gpu = asked
    runtime = runtime_of(shape, recipe, gpu, 1)
    timeline = timeline_of(shape, recipe, runtime)
    peaks = [timeline.read(batch)[0].bytes for batch in (1, 2, 3, 8)]
    assert peaks == sorted(peaks)


def test_memory_others_use_lessens_the_capacity() -> None:
    shape, recipe, _ = question({"style": "nanochat"})
    free = memory_estimate(shape, recipe, HOPPER)
    shared = memory_estimate(shape, recipe, HOPPER, reserve_bytes=3 * GIB)
    today = memory_estimate(shape, recipe, HOPPER, capacity_bytes=GIB // 2)
    assert free.capacity_bytes - shared.capacity_bytes == 3 * GIB
    assert free.headroom_bytes - shared.headroom_bytes == 3 * GIB
    assert today.capacity_bytes == GIB // 2
    assert free.fits
    assert not today.fits


@pytest.mark.parametrize("gpu", [HOPPER, PASCAL, PROCESSOR], ids=lambda gpu: gpu.id)
def test_weights_of_a_known_model_are_counted_in_full(gpu: Gpu) -> None:
    shape = shape_for("nanochat", 12)
    recipe = GenerationRecipe(
        batch=2, prompt_tokens=512, max_new_tokens=512, kv_dtype="bf16", weight_dtype="bf16"
    )
    terms = {term.name: term for term in memory_estimate(shape, recipe, gpu).terms}
    weights = [term for name, term in terms.items() if name.startswith("weights")]
    assert sum(term.bytes for term in weights) == pytest.approx(2 * 286_261_500, rel=1e-5)
    cache = 2 * 12 * 1024 * 768 * 2  # two sequences of twelve layers, for keys and for values
    assert terms["keys"].bytes == terms["values"].bytes == cache
    assert {term.basis for term in weights} == {"exact"}

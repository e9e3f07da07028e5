"""Predicted memory of generation against torch's allocator: a prefill and the last decode step.

The real model, the real cache and the real choice of a token, recorded from before it was built.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from snugpt.estimate.generation import generation_timeline
from snugpt.model.build import build_for_generation, set_weights
from snugpt.model.kv_cache import KVCache
from snugpt.model.sampling import Sampling, choose
from snugpt.run.cpu_allocations import CpuAllocations
from snugpt.spec.recipe import GenerationRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, ModelShape, shape_for
from snugpt.units import KIB

LOWEST_RATIO, HIGHEST_RATIO = 0.99, 1.01
LIBRARY_SCRATCH_BYTES = 256 * KIB  # of oneDNN's bf16 matmul; it is not walked
NUCLEUS_BYTES = 13  # per token of the vocabulary, which a top_p takes beyond what is predicted

pytestmark = pytest.mark.usefixtures("one_thread")


def small(style: str, **pinned) -> ModelShape:
    sizes = {"context_len": 96, "width": 64, "heads": 4, "vocab_size": 512}
    if style == "llama":
        sizes["kv_heads"] = 2
    return shape_for(style, pinned.pop("depth", 3), **(sizes | pinned))


def generation(
    batch: int = 1, prompt: int = 60, new: int = 20, dtype: str = "fp32"
) -> GenerationRecipe:
    return GenerationRecipe(
        batch=batch, prompt_tokens=prompt, max_new_tokens=new, kv_dtype=dtype, weight_dtype=dtype
    )


def runtime() -> Runtime:
    return Runtime(device="cpu", attention="cpu", num_threads=torch.get_num_threads())


@torch.no_grad()
def measured(shape: ModelShape, recipe: GenerationRecipe, sampling: Sampling) -> dict[str, int]:
    """The most bytes alive while the prompt is read, and while the last token is made."""
    generator = torch.Generator().manual_seed(0)

    def take(tokens: torch.Tensor) -> torch.Tensor:
        return choose(model.next_logits(tokens, cache), sampling, generator)

    with CpuAllocations(keep_events=False) as allocations:
        model = build_for_generation(shape, runtime(), recipe.weight_dtype, "cpu")
        set_weights(model, seed=0)
        cache = KVCache(shape, recipe.batch, recipe.cache_len, model.dtype, "cpu")
        cache.keys.zero_()  # what lies there unset may be no number, which sampling refuses
        cache.values.zero_()
        prompt = torch.zeros(recipe.batch, recipe.prompt_tokens, dtype=torch.int64)
        allocations.mark("prefill")
        tokens = take(prompt)
        del prompt
        cache.length = recipe.cache_len - 1
        allocations.mark("decode")
        take(tokens)
    assert not allocations.interrupted
    return allocations.phases


def compare(
    shape: ModelShape, recipe: GenerationRecipe, sampling: Sampling | None = None
) -> dict[str, tuple[int, int]]:
    """Predicted and measured bytes of each phase."""
    phases = measured(shape, recipe, sampling or Sampling())
    _, predicted = generation_timeline(shape, recipe, runtime()).read(recipe.batch)
    assert predicted.keys() == phases.keys()
    return {phase: (predicted[phase], phases[phase]) for phase in phases}


def assert_within_a_hundredth(phases: dict[str, tuple[int, int]]) -> None:
    ratios = {phase: predicted / measured for phase, (predicted, measured) in phases.items()}
    assert not {p: r for p, r in ratios.items() if not LOWEST_RATIO <= r <= HIGHEST_RATIO}


@pytest.mark.parametrize(("batch", "vocab"), tuple(product((1, 4), (512, 32768))))
@pytest.mark.parametrize("style", STYLES)
def test_prefill_and_decode_are_predicted(style, batch: int, vocab: int) -> None:
    assert_within_a_hundredth(compare(small(style, vocab_size=vocab), generation(batch)))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("style", STYLES)
def test_grouped_heads_are_predicted(style, kv_heads: int) -> None:
    assert_within_a_hundredth(compare(small(style, kv_heads=kv_heads), generation(4)))


@pytest.mark.parametrize("prompt", [100, 129, 400])
@pytest.mark.parametrize("batch", [1, 4])
def test_prompts_within_and_beyond_the_window_are_predicted(prompt: int, batch: int) -> None:
    shape = small("nanochat", context_len=512)
    assert shape.window_tokens(0) == 128
    assert_within_a_hundredth(compare(shape, generation(batch, prompt, new=50)))


@pytest.mark.parametrize("style", STYLES)
def test_bf16_weights_are_predicted_but_for_the_library_s_scratch(style) -> None:
    shape = small(style, vocab_size=8192)
    halves = compare(shape, generation(4, dtype="bf16"))
    for predicted, measured_bytes in halves.values():
        assert 0 <= measured_bytes - predicted <= LIBRARY_SCRATCH_BYTES
    wholes = compare(shape, generation(4))
    assert halves["prefill"][1] < 0.8 * wholes["prefill"][1]  # logits stay fp32


@pytest.mark.parametrize("style", STYLES)
def test_lengths_that_fill_other_tiles_are_predicted(style) -> None:
    for prompt, new in ((1, 1), (1, 700), (250, 3), (800, 100)):
        shape = small(style, depth=2, context_len=1024)
        assert_within_a_hundredth(compare(shape, generation(2, prompt, new)))


@pytest.mark.parametrize("top_k", [None, 1, 200])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_no_temperature_and_no_top_k_takes_more_than_predicted(temperature, top_k) -> None:
    shape, sampling = (
        small("llama", vocab_size=32768),
        Sampling(temperature=temperature, top_k=top_k),
    )
    for predicted, measured_bytes in compare(shape, generation(4), sampling).values():
        assert measured_bytes <= predicted / LOWEST_RATIO


@pytest.mark.parametrize("top_k", [None, 40])
def test_top_p_takes_a_sort_of_the_vocabulary_more(top_k: int | None) -> None:
    shape, sampling = small("llama", vocab_size=32768), Sampling(top_k=top_k, top_p=0.9)
    for predicted, measured_bytes in compare(shape, generation(4), sampling).values():
        assert measured_bytes - predicted <= NUCLEUS_BYTES * 4 * shape.vocab_size + 4 * KIB


@pytest.mark.parametrize("style", STYLES)
def test_scratch_of_two_threads_is_predicted(style) -> None:
    torch.set_num_threads(2)
    try:
        ratios = compare(small(style, context_len=256), generation(2, 200, 40))
    finally:
        torch.set_num_threads(1)
    assert_within_a_hundredth(ratios)

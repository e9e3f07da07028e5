"""Generation with a cache against the full forward pass."""

from __future__ import annotations

import pytest
import torch
from small_model import random_batch, small_model, small_shape
from torch import Tensor

from snugpt.model.gpt import GPT
from snugpt.model.kv_cache import KVCache
from snugpt.model.loss import capped_logits
from snugpt.spec.shape import STYLES

BATCH, PROMPT, NEW = 2, 140, 12  # windows are 128 tokens at a context of 256


def full_logits(model: GPT, tokens: Tensor) -> Tensor:
    """(B, T) -> (B, V), without a cache."""
    shape = model.shape
    last = model.hidden(tokens).view(*tokens.shape, -1)[:, -1]
    return capped_logits(last, model.head_weight[: shape.vocab_size], shape.logit_softcap)


def cache_for(model: GPT, max_len: int) -> KVCache:
    return KVCache(model.shape, BATCH, max_len, torch.float32, "cpu")


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("prompt", [1, 5, 127, PROMPT])
@pytest.mark.parametrize("style", STYLES)
def test_greedy_decoding_is_that_of_the_full_pass(style, prompt, kv_heads):
    shape = small_shape(style, kv_heads=kv_heads)
    model = small_model(shape).eval()
    tokens, _ = random_batch(shape, BATCH, prompt)
    cache = cache_for(model, prompt + NEW)
    with torch.no_grad():
        logits = model.next_logits(tokens, cache)
        for _ in range(NEW):
            wanted = full_logits(model, tokens)
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
            following = logits.argmax(-1, keepdim=True)
            assert torch.equal(following, wanted.argmax(-1, keepdim=True))
            tokens = torch.cat([tokens, following], 1)
            logits = model.next_logits(following, cache)
    assert cache.length == tokens.shape[1]


@pytest.mark.parametrize("first", [1, 20, 135])
@pytest.mark.parametrize("style", STYLES)
def test_tokens_may_follow_in_a_second_prompt(style, first):
    shape = small_shape(style)
    model = small_model(shape).eval()
    tokens, _ = random_batch(shape, BATCH, PROMPT + 10)
    cache = cache_for(model, PROMPT + 10)
    with torch.no_grad():
        model.next_logits(tokens[:, :first], cache)
        logits = model.next_logits(tokens[:, first:], cache)
        torch.testing.assert_close(logits, full_logits(model, tokens), rtol=1e-4, atol=1e-4)


def test_the_cache_is_two_tensors_of_the_longest_sequence():
    shape = small_shape("llama", kv_heads=1)
    cache = KVCache(shape, 3, 100, torch.bfloat16, "cpu")
    held = cache.keys.nbytes + cache.values.nbytes
    assert held == 2 * shape.num_layers * 3 * 100 * shape.kv_dim * 2

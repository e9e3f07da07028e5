"""Bits per byte against a computation of its own: full logits in float64, bytes counted as text."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_plan import CONTEXT, tiny_plan, write_text

from snugpt.data.loader import ValidationLoader
from snugpt.data.prepare import PreparedData, prepare
from snugpt.model.build import build
from snugpt.model.gpt import GPT
from snugpt.run.evaluate import bits_per_byte
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime

ROWS = 7  # the last batch of two is half full


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("text")
    (folder / "docs").mkdir()
    for number in range(40):  # short documents: separators lie in the validation text
        path = write_text(folder / "docs" / f"{number}.txt", num_words=60)
        path.write_text(f"{number}: naïve Übung — {path.read_text()}", encoding="utf-8")
    return prepare(str(folder / "docs"), vocab_size=300, seq_len=CONTEXT, cache_dir=folder / "c")


def model_and_recipe(style: str) -> tuple[GPT, TrainingRecipe]:
    plan = tiny_plan(Path("text.txt"), style)
    attention = "math" if plan.shape.dropout else "cpu"
    model = build(plan.shape, Runtime(device="cpu", attention=attention), seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return model, plan.recipe


def loader(data: PreparedData, max_rows: int = ROWS, batch: int = 2) -> ValidationLoader:
    return ValidationLoader(
        tokens=data.validation.tokens, seq_len=CONTEXT, device_batch_size=batch, max_rows=max_rows
    )


@torch.no_grad()
def by_hand(model: GPT, data: PreparedData) -> float:
    """Over the same rows: the stream cut every T tokens, each token a target but the first."""
    stream = np.asarray(data.validation.tokens, dtype=np.int64)
    nats, num_bytes = 0.0, 0
    for row in range(ROWS):
        tokens = torch.from_numpy(stream[row * CONTEXT : (row + 1) * CONTEXT + 1])
        hidden = model.eval().hidden(tokens[None, :-1]).double()
        head = model.head_weight[: model.shape.vocab_size].double()
        logits = hidden @ head.t()
        if model.shape.logit_softcap:
            logits = model.shape.logit_softcap * torch.tanh(logits / model.shape.logit_softcap)
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        for loss, token in zip(losses.tolist(), tokens[1:].tolist(), strict=True):
            if token != data.tokenizer.end_of_text_id:
                nats += loss
                num_bytes += len(data.tokenizer.bytes_of(token))
    return nats / math.log(2) / num_bytes


@pytest.mark.parametrize("style", ["nanochat", "llama", "gpt2"])
def test_it_is_the_cross_entropy_of_the_text_over_its_utf8_bytes(style, data) -> None:
    model, recipe = model_and_recipe(style)
    separators = data.validation.tokens[: ROWS * CONTEXT + 1] == data.tokenizer.end_of_text_id
    assert separators[1:].any()
    found = bits_per_byte(model, recipe, loader(data), data.tokenizer.token_bytes)
    assert found == pytest.approx(by_hand(model, data), rel=1e-6)


def test_it_does_not_depend_on_the_batch(data: PreparedData) -> None:
    model, recipe = model_and_recipe("llama")
    found = [
        bits_per_byte(model, recipe, loader(data, batch=batch), data.tokenizer.token_bytes)
        for batch in (1, 3, 16)
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_mode_random_state_and_gradients_alone(data, training: bool) -> None:
    model, recipe = model_and_recipe("gpt2")
    assert model.shape.dropout
    model.train(training)
    torch.manual_seed(8)
    before = torch.get_rng_state()
    first = bits_per_byte(model, recipe, loader(data), data.tokenizer.token_bytes)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training is training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
    assert first == bits_per_byte(model, recipe, loader(data), data.tokenizer.token_bytes)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_it_stops_between_batches_and_then_has_no_result(data, after: int) -> None:
    model, recipe = model_and_recipe("llama")
    asked = iter([False] * after + [True])
    found = bits_per_byte(
        model.train(), recipe, loader(data), data.tokenizer.token_bytes, stop=lambda: next(asked)
    )
    assert found is None
    assert model.training


def test_an_untrained_model_of_uniform_logits_pays_log_v_per_token(data: PreparedData) -> None:
    model, recipe = model_and_recipe("llama")
    with torch.no_grad():
        model.head.zero_()
    found = bits_per_byte(model, recipe, loader(data), data.tokenizer.token_bytes)
    targets = np.asarray(data.validation.tokens[1 : ROWS * CONTEXT + 1])
    lengths = data.tokenizer.token_bytes[targets]
    wanted = np.count_nonzero(lengths) * math.log2(model.shape.vocab_size) / lengths.sum()
    assert found == pytest.approx(wanted, rel=1e-6)

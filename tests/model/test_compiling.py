"""Compiled sublayers without Inductor: the graphs are traced whole, shared, and say the same.

Inductor itself is held in bench/inductor_cpu.py (real steps) and bench/inductor_oracle.py (bytes).
"""

from __future__ import annotations

import pytest
import torch

from snugpt.model import compiling
from snugpt.model.build import build
from snugpt.model.gpt import GPT
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, Style, shape_for

pytestmark = pytest.mark.filterwarnings("default")  # Dynamo warns of what it does itself


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """The graphs that were compiled, each run as it is."""
    made: list[torch.fx.GraphModule] = []

    def as_it_is(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "sublayer_backend", as_it_is)
    torch._dynamo.reset()
    return made


def model_of(style: Style) -> GPT:
    """Six layers: with and without windows and value embeddings in nanochat."""
    shape = shape_for(style, 6, context_len=256, width=64, heads=2, vocab_size=64)
    model = build(shape, Runtime(device="cpu", attention="cpu"), seed=1)
    drawn = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if name.endswith(("output", "down", "value_gate")):  # zero at the start, and so no check
            torch.nn.init.normal_(weight, std=0.1, generator=drawn)
    return model


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    tokens = torch.arange(256)[None] % 64
    model.zero_grad()
    model.loss(model.hidden(tokens), tokens, chunk=256, scale=1 / 256).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(("style", "expected"), [("nanochat", 4), ("llama", 2), ("gpt2", 2)])
def test_compiled_layers_give_the_same_gradients_and_share_their_graphs(graphs, style, expected):
    model = model_of(style)
    eager = gradients(model)
    compiling.compile_sublayers(model)
    compiled = gradients(model)
    assert len(graphs) == expected
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-4, atol=1e-6)
    model.recompute_blocks = True
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, eager[name], rtol=1e-4, atol=1e-6)
    assert len(graphs) == expected


def test_evaluation_runs_what_is_not_compiled(graphs):
    model = model_of("llama")
    compiling.compile_sublayers(model)
    with torch.no_grad():
        model.hidden(torch.arange(256)[None] % 64)
    assert graphs == []


@pytest.mark.parametrize("style", STYLES)
def test_a_compiled_model_has_the_parameters_of_one_that_is_not(graphs, style):
    model = model_of(style)
    before = list(model.state_dict())
    compiling.compile_sublayers(model)
    assert list(model.state_dict()) == before

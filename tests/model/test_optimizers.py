"""Muon against a reference by singular values; who updates what, and what state it keeps."""

from __future__ import annotations

import pytest
import torch
from small_model import random_batch, small_model, small_recipe, small_shape
from torch import Tensor

from snugpt.model.build import group_of
from snugpt.model.muon import Muon, orthogonalised
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import step
from snugpt.spec.shape import STYLES

SIZES = [(32, 32), (64, 16), (16, 64), (4, 12), (90, 70)]


def random_matrix(size: tuple[int, int], dtype=torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def by_singular_values(matrix: Tensor) -> Tensor:
    """What five Newton-Schulz steps do, done to the singular values of the normalised matrix."""
    u, s, vh = torch.linalg.svd(matrix / (matrix.norm() + 1e-7), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("size", SIZES)
def test_orthogonalising_moves_the_singular_values_only(size):
    matrix = random_matrix(size)
    before = matrix.clone()
    torch.testing.assert_close(orthogonalised(matrix), by_singular_values(matrix))
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("size", [size for size in SIZES if size[0] != size[1]])
def test_singular_values_end_near_one(size):
    values = torch.linalg.svdvals(orthogonalised(random_matrix(size, torch.float32)))
    assert values.min() > 0.65
    assert values.max() < 1.25


@pytest.mark.parametrize("size", SIZES)
def test_three_steps_of_muon_are_those_of_a_plain_reference(size):
    rate, decay, beta = 0.1, 0.2, 0.95
    weight = torch.nn.Parameter(random_matrix(size).clone())
    wanted, momentum = weight.detach().clone(), torch.zeros(size, dtype=torch.float64)
    muon = Muon([weight], rate, beta, weight_decay=decay)
    for seed in range(3):
        grad = torch.randn(size, generator=torch.Generator().manual_seed(seed)).double()
        weight.grad = grad.clone()
        muon.step()
        momentum = beta * momentum + (1 - beta) * grad
        update = by_singular_values((1 - beta) * grad + beta * momentum)
        wanted *= 1 - rate * decay
        wanted -= rate * max(1, size[0] / size[1]) ** 0.5 * update
    torch.testing.assert_close(weight.detach(), wanted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("style", STYLES)
def test_the_optimizers_own_every_parameter_once(style, optimizer, tied):
    model = small_model(small_shape(style, tie=tied))
    optimizers = optimizers_for(model, small_recipe(1, 8, optimizer=optimizer))
    owned = [id(w) for o in optimizers for group in o.param_groups for w in group["params"]]
    assert sorted(owned) == sorted(id(w) for w in model.parameters())
    muons = {id(w) for o in optimizers if isinstance(o, Muon) for w in o.param_groups[0]["params"]}
    matrices = {id(w) for name, w in model.named_parameters() if group_of(name) == "matrices"}
    assert muons == (matrices if optimizer == "muon" else set())


@pytest.mark.parametrize(("optimizer", "matrix_bytes"), [("muon", 4), ("adamw", 8)])
@pytest.mark.parametrize("style", STYLES)
def test_state_is_four_bytes_per_element_for_muon_and_eight_for_adamw(
    style, optimizer, matrix_bytes
):
    model = small_model(small_shape(style))
    recipe = small_recipe(2, 20, optimizer=optimizer)
    optimizers = optimizers_for(model, recipe)
    step(model, optimizers, recipe, lambda _: random_batch(model.shape, 2, 20))
    states = {id(w): s for o in optimizers for w, s in o.state.items()}
    for name, weight in model.named_parameters():
        held = sum(tensor.nbytes for tensor in states[id(weight)].values() if tensor.dim())
        each = matrix_bytes if group_of(name) == "matrices" else 8
        assert held == each * weight.numel(), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("style", STYLES)
def test_only_matrices_decay(style, optimizer):
    model = small_model(small_shape(style))
    recipe = small_recipe(1, 8, optimizer=optimizer, weight_decay=0.1)
    decaying = {
        id(weight)
        for each in optimizers_for(model, recipe)
        for group in each.param_groups
        if group["weight_decay"]
        for weight in group["params"]
    }
    assert decaying == {id(w) for n, w in model.named_parameters() if group_of(n) == "matrices"}

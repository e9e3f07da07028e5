"""Rounding by chance: to a neighbour, right on average, and the same again for the same step."""

from __future__ import annotations

import pytest
import torch

from snugpt.model.stochastic_rounding import Chance, round_by_chance_

WEIGHT = torch.empty(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_each_value_becomes_one_of_its_two_neighbours_in_bf16():
    x = torch.randn(10_000, generator=generator(1)) * 1e3
    rounded = round_by_chance_(x.clone(), generator())
    assert torch.equal(rounded, rounded.bfloat16().float())
    toward_zero = (x.view(torch.int32) & -65536).view(torch.float32)
    away = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((rounded == toward_zero) | (rounded == away)).all()
    assert (rounded == away).float().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [1.0, -1.0, 3e-30])
def test_the_expected_value_is_the_exact_one(start, share):
    low = torch.tensor(start).bfloat16().float()
    spacing = (low.view(torch.int32) + 65536).view(torch.float32) - low
    x = (low + share * spacing).expand(100_000).clone()
    raised = (round_by_chance_(x, generator()) != low).float().mean().item()
    assert raised == pytest.approx(share, abs=0.006)


def test_what_is_no_number_stays_none_and_bf16_values_stay_as_they_are():
    all_ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # CUDA's nan
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.5, -3e38])
    x = torch.cat([all_ones, odd.bfloat16().float()]).repeat(1000, 1)
    rounded = round_by_chance_(x.clone(), generator())
    torch.testing.assert_close(rounded, x, rtol=0, atol=0, equal_nan=True)


def test_updates_too_small_for_bf16_add_up():
    weight = torch.ones(2000).bfloat16()
    nearest = weight.clone()
    source = generator()
    for _ in range(100):
        weight.copy_(round_by_chance_(weight.float() + 1e-4, source))
        nearest = (nearest.float() + 1e-4).bfloat16()
    assert torch.equal(nearest, torch.ones(2000).bfloat16())
    assert weight.float().mean().item() == pytest.approx(1.01, abs=0.0005)


def test_chance_is_drawn_from_seed_step_and_name_whatever_was_drawn_before():
    def drawn(seed: int, name: str, num_steps: int, before: int = 0) -> list[int]:
        chance = Chance(seed)
        for i in range(before):
            torch.randint(9, (5,), generator=chance.of(WEIGHT, "other", i))
        return torch.randint(1 << 30, (4,), generator=chance.of(WEIGHT, name, num_steps)).tolist()

    first = drawn(0, "head", 7)
    assert drawn(0, "head", 7, before=3) == first
    others = [drawn(1, "head", 7), drawn(0, "embedding", 7), drawn(0, "head", 8)]
    assert all(other != first for other in others)

"""AdamW stretch by stretch against PyTorch's, with weights and moments in every dtype."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from snugpt.estimate import updating
from snugpt.model.adamw import AdamW
from snugpt.model.muon import Muon
from snugpt.model.stored_state import Bf16, Fp32, Int8

SIZE = (40, 256)
FORMATS = {"fp32": Fp32(), "bf16": Bf16(), "int8": Int8()}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gradient(seed: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def start(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter((0.1 * gradient(99)).to(dtype))


def moved(optimizer_type, weight, steps: int = 20, **asked):
    optimizer = optimizer_type([weight], lr=0.01, weight_decay=0.1, **asked)
    for seed in range(steps):
        weight.grad = gradient(seed).to(weight.dtype)
        optimizer.step()
    return optimizer


def formats(weight, name: str) -> dict[str, object]:
    return {"formats": {weight: FORMATS[name]}, "names": {weight: "w"}}


def test_the_plain_case_is_pytorchs_to_the_bit():
    ours, theirs = start(), start()
    moved(AdamW, ours, betas=(0.8, 0.95))
    moved(torch.optim.AdamW, theirs, betas=(0.8, 0.95), fused=True)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("elements", [1 << 21, 256, 768, 10_240])
def test_the_update_by_stretches_is_adamw(monkeypatch, elements):
    """Fp32 moments of bf16 weights, and of fp32 weights that are made to go this way."""
    monkeypatch.setattr(updating, "STRETCH_ELEMENTS", elements)
    monkeypatch.setattr(AdamW, "_fused", AdamW._by_stretches)
    ours, theirs = start(), start()
    moved(AdamW, ours, betas=(0.8, 0.95))
    moved(torch.optim.AdamW, theirs, betas=(0.8, 0.95))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [AdamW, Muon], ids=["adamw", "muon"])
@pytest.mark.parametrize(("state", "weights"), list(product(FORMATS, DTYPES)))
def test_low_bits_stay_near_the_fp32_run_and_weights_follow(optimizer, state, weights):
    exact, low = start(), start(DTYPES[weights])
    before = low.detach().float().clone()
    moved(optimizer, exact)
    moved(optimizer, low, **formats(low, state))
    way = (exact - start()).norm()
    distance = ((low.float() - before) - (exact - start())).norm() / way
    lowest = 0.0 if (state, weights) == ("fp32", "fp32") else 1e-4
    assert lowest <= distance < 0.2, distance
    assert low.dtype == DTYPES[weights]


@pytest.mark.parametrize("optimizer", [AdamW, Muon], ids=["adamw", "muon"])
@pytest.mark.parametrize("state", FORMATS)
def test_the_stretch_does_not_change_the_result(monkeypatch, optimizer, state):
    whole, parts = start(), start()
    moved(optimizer, whole, **formats(whole, state))
    monkeypatch.setattr(updating, "STRETCH_ELEMENTS", 1024)
    moved(optimizer, parts, **formats(parts, state))
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("optimizer", [AdamW, Muon], ids=["adamw", "muon"])
def test_bf16_weights_take_steps_too_small_for_their_last_bit(optimizer):
    weight = torch.nn.Parameter(torch.ones(SIZE).bfloat16())
    moved(optimizer, weight, 0)
    updating_by_little = optimizer([weight], lr=1e-5, **formats(weight, "fp32"))
    for _ in range(50):
        weight.grad = torch.eye(*SIZE).bfloat16() + 1
        updating_by_little.step()
    drift = weight.float().mean().item() - 1
    assert -1e-3 < drift < -1e-6

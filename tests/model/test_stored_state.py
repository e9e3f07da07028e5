"""Moments in 4, 2 and 1 bytes: what is stored is near what was given, int8 is torchao's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from snugpt.errors import FailedError
from snugpt.model.stored_state import Bf16, Fp32, Int8, dynamic_map, require_torchao

ELEMENTS = 64 * 256


def moment(name: str) -> torch.Tensor:
    """Magnitudes over twelve decades, as moments have them; a mean of squares has no sign."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=source) * 10 ** (
        12 * torch.rand(64, 256, generator=source) - 12
    )
    return x.square() if name == "exp_avg_sq" else x


def stored(stored_as, name: str, stretches: int = 1):
    weight = torch.empty(64, 256)
    state = stored_as.zeros(name, weight, weight.device)
    x, each = moment(name).view(-1), ELEMENTS // stretches
    for start in range(0, ELEMENTS, each):
        stretch = slice(start, start + each)
        value = stored_as.read(state, name, stretch)
        value.copy_(x[stretch])
        stored_as.write(state, name, stretch, value)
    return state


@pytest.mark.parametrize("stored_as", [Fp32(), Bf16(), Int8()], ids=["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "momentum"])
def test_nothing_is_stored_at_the_start_and_near_to_everything_later(stored_as, name):
    weight = torch.empty(64, 256)
    empty = stored_as.zeros(name, weight, weight.device)
    whole = slice(0, ELEMENTS)
    assert not stored_as.read(empty, name, whole).any()
    found = stored_as.read(stored(stored_as, name), name, whole)
    largest = moment(name).abs().amax(1, keepdim=True)  # of each block
    error = (found.view(64, 256) - moment(name)).abs() / largest
    assert error.max() <= {Fp32: 0, Bf16: 2**-7, Int8: 0.009}[type(stored_as)]
    if not isinstance(stored_as, Fp32):
        assert error.max() > 0


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_int8_is_what_torchao_stores(name):
    dynamic_map(True)  # brings torchao in without its complaints
    from torchao.optim.subclass_8bit import OptimState8bit

    theirs = OptimState8bit.zeros((64, 256), signed=name != "exp_avg_sq")
    theirs.copy_(moment(name))
    ours = stored(Int8(), name, stretches=4)
    assert torch.equal(ours[f"{name}_scale"], theirs.scale)
    differ = (ours[name] != theirs.codes).nonzero()
    assert len(differ) <= 2  # half-way between two values the last bit of a division decides
    found = Int8().read(ours, name, slice(0, ELEMENTS))
    torch.testing.assert_close(found.view(64, 256), theirs.dequantize(), rtol=0.02, atol=1e-12)


def test_without_torchao_int8_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FailedError, match="needs torchao") as caught:
        require_torchao()
    assert "\n" not in caught.value.message
    assert caught.value.hint == "pip install 'snugpt[lowbit]'"


def test_torchao_is_imported_by_int8_only_and_says_nothing():
    lines = (
        "import sys, torch, snugpt.model.optimizers",
        "from snugpt.model.stored_state import dynamic_map",
        "assert not any(name.startswith('torchao') for name in sys.modules)",
        "assert len(dynamic_map(True)) == len(dynamic_map(False)) == 256",
        "assert 'torchao' in sys.modules",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=os.environ
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

"""Models found by name, `package.module:callable`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from snugpt.errors import BadQuestionError, FailedError
from snugpt.tracing.named_model import trace_named


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory; its name is new in every test."""
    name = f"module_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)\n"
        "    def forward(self, idx, targets=None):\n"
        "        logits = self.head(self.table(idx))\n"
        "        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())\n"
        "        return logits, loss\n"
        "def build(): return Model()\n"
        "class Mean(nn.Linear):\n"
        "    def forward(self, x): return super().forward(x).mean()\n"
        "def with_batch(): return Mean(8, 50), torch.zeros(6, 8)\n"
        "def sized(batch_size=1): return Mean(8, 50), torch.zeros(batch_size, 8)\n"
        "def raises():\n"
        "    raise ValueError('no such\\nlayer')\n"
        "number = 3\n"
        "model = Model()\n",
        encoding="utf-8",
    )
    (tmp_path / f"{name}_broken.py").write_text("import torch\n1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_a_model_is_found_by_its_name(named: str) -> None:
    assert trace_named(f"{named}:build", seq_len=16).batch_size == 8
    assert trace_named(f"{named}:Model", batch_size=3, seq_len=16, gpu="t4").batch_size == 3
    assert trace_named(f"{named}:with_batch").batch_size == 6
    sized = trace_named(f"{named}:sized", batch_size=5)
    assert sized.batch_size == 5
    assert sized.largest_batch()


def test_a_name_that_leads_nowhere_says_what_may_have_been_meant(named: str) -> None:
    for spec, said in (
        (f"{named}:biuld", "did you mean 'build'"),
        (f"{named[:-1]}:build", f"did you mean '{named}'"),
        ("build", "package.module:callable"),
        ("a b:c", "package.module:callable"),
        (f"{named}:number", "a function or class that builds a model"),
        (f"{named}:model", "a function or class that builds a model"),
        ("torch.nnn:Linear", "unknown module in torch 'nnn'"),
    ):
        with pytest.raises(BadQuestionError, match=said):
            trace_named(spec)
    with pytest.raises(FailedError, match=rf"{named}\.py:17: `raise ValueError.*no such layer"):
        trace_named(f"{named}:raises")
    with pytest.raises(FailedError, match=rf"{named}_broken\.py:2: `1 / 0` raised ZeroDivision"):
        trace_named(f"{named}_broken:build")

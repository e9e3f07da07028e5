"""Small models as people write them, and two independent scales to weigh them on."""

from __future__ import annotations

import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

import snugpt
from snugpt.run.cpu_allocations import CpuAllocations
from snugpt.spec.runtime import Runtime
from snugpt.tracing.kernels import kernels_of
from snugpt.tracing.ways import ways_of

H100 = Runtime(device="cuda", attention="flash", capability=(9, 0))
T4 = Runtime(device="cuda", attention="efficient", capability=(7, 5))
V, C, T = 211, 64, 32
CHILD = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}


class Block(nn.Module):
    def __init__(self, heads: int = 4, dropout: float = 0.0, rms: bool = False) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norms = nn.ModuleList(nn.RMSNorm(C) if rms else nn.LayerNorm(C) for _ in range(2))
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norms[0](x)).split(C, dim=2)
        q, k, v = (each.view(B, T, self.heads, -1).transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Tiny(nn.Module):
    """A GPT of two layers that returns logits and loss, as nanoGPT's does."""

    def __init__(self, *, tied: bool = False, recompute: bool = False, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, C)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(2))
        self.head = nn.Linear(C, V, bias=False)
        self.recompute = recompute
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        logits = self.head(x)
        return logits, F.cross_entropy(logits.view(-1, V), targets.view(-1))


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(96, 256), nn.SiLU(), nn.Linear(256, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def tokens(batch: int = 4) -> tuple[Tensor, Tensor]:
    return torch.zeros(batch, T, dtype=torch.int64), torch.zeros(batch, T, dtype=torch.int64)


def step(model, optimizer, batch, mark=lambda phase: None, dtype=None) -> None:
    """A loop as people write it; snugpt is to trace the same."""
    mark("forward")
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        output = model(*batch)
        loss = output[1] if isinstance(output, tuple) else output.sum()
    del output
    mark("backward")
    loss.backward()
    del loss, batch
    mark("clip")
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    mark("optimizer")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def mem_tracker_peak(build, make_batch, runtime: Runtime, dtype=None) -> int:
    """PyTorch's own MemTracker over the second step, on the meta device, by the card's ways."""
    with kernels_of(runtime), ways_of(runtime):
        with torch.device("meta"):
            model = build()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        step(model, optimizer, make_batch(), dtype=dtype)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            step(model, optimizer, make_batch(), dtype=dtype)
    snapshot = tracker.get_tracker_snapshot("peak")
    return sum(device["Total"] for device in snapshot.values())


def on_the_cpu(build, make_batch) -> dict[str, int]:
    """The peak of each phase of a second step that really runs, by torch's CPU allocator."""
    with CpuAllocations(keep_events=False) as allocations:
        model = build()
        optimizer = torch.optim.AdamW(model.parameters())
        step(model, optimizer, make_batch())
        allocations.mark("forward")
        step(model, optimizer, make_batch(), allocations.mark)
    assert not allocations.interrupted
    return allocations.phases


def trace(model, batch, *, gpu="h100", **options):
    return snugpt.trace(model, batch, gpu=gpu, **options)


def on_meta(make):
    def batch():
        with torch.device("meta"):
            return tuple(torch.empty_like(each, device="meta") for each in make())

    return batch

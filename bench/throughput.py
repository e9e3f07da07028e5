"""Tokens per second of training and generation on the CPU, and the step's peak memory.

    python bench/throughput.py [--nanochat CHECKOUT]

A model of 4 layers x 192, vocabulary 2048, rows of 256, fp32, Muon and AdamW. With a checkout of
nanochat its model of the same size takes every other step in the same process (eager, as ours), so
that a machine that changes speed does so for both. Its code is only imported from the path given.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the peer compiles its optimizer otherwise

import torch

from snugpt.model.build import build, build_for_generation, set_weights
from snugpt.model.kv_cache import KVCache
from snugpt.model.optimizers import optimizers_for
from snugpt.model.sampling import Sampling, choose
from snugpt.model.step import step
from snugpt.run.cpu_allocations import CpuAllocations
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import shape_for
from snugpt.units import MIB

LAYERS, WIDTH, HEADS, VOCAB, T, B = 4, 192, 3, 2048, 256, 8
STEPS = 20
PROMPT, NEW = 32, 128
Step = Callable[[], object]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and targets, (B, T) each."""
    ids = torch.randint(VOCAB, (B, T + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def our_step() -> Step:
    """One training step of ours."""
    shape = shape_for("nanochat", LAYERS, width=WIDTH, heads=HEADS, vocab_size=VOCAB, context_len=T)
    schedule = Schedule(
        learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.0, warmup_fraction=0.0,
        cooldown_fraction=0.0, final_fraction=1.0, clip_norm=1.0, seed=0, eval_every_steps=1,
        eval_tokens=T, save_every_steps=1,
    )  # fmt: skip
    recipe = TrainingRecipe(
        seq_len=T, device_batch_size=B, grad_accum_steps=1, total_batch_tokens=B * T,
        total_tokens=B * T, compute_dtype="fp32", loss="chunked", loss_chunk_tokens=256,
        checkpoint="none", optimizer="muon", schedule=schedule,
    )  # fmt: skip
    model = build(shape, runtime(), seed=0)
    optimizers = optimizers_for(model, recipe)
    return lambda: step(model, optimizers, recipe, lambda micro_step: batch())


def their_step() -> Step:
    """One training step of nanochat's model and optimizer, as its base_train takes it."""
    from nanochat.gpt import GPT, GPTConfig

    config = GPTConfig(
        sequence_len=T, vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_kv_head=HEADS,
        n_embd=WIDTH, window_pattern="SSSL",
    )  # fmt: skip
    model = GPT(config)
    model.init_weights()
    optimizer = model.setup_optimizer()

    def take() -> None:
        tokens, targets = batch()
        model(tokens, targets).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    return take


def runtime() -> Runtime:
    """The CPU's kernels with torch's number of threads."""
    return Runtime(device="cpu", attention="cpu", num_threads=torch.get_num_threads())


def peak_mib(make: Callable[[], Step]) -> float:
    """The allocator's peak while a model is made and takes two steps."""
    gc.collect()
    with CpuAllocations(keep_events=False) as allocations:
        take = make()
        take()
        take()
    return allocations.peak_bytes / MIB


def training(makers: dict[str, Callable[[], Step]]) -> None:
    """Steps in turn; print tokens per second and the ratio pair by pair."""
    steps = {name: make() for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(STEPS + 3):
        for name, take in steps.items():
            began = time.perf_counter()
            take()
            if round_number >= 3:
                times[name].append(time.perf_counter() - began)
    print(f"{'training, ' + str(B * T) + ' tokens a step':32} tokens/s    peak MiB")
    for name, found in times.items():
        rate = B * T / statistics.median(found)
        print(f"{name:32} {rate:8,.0f} {peak_mib(makers[name]):11.1f}")
    if len(times) == 2:
        ours, theirs = times.values()
        ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        print(f"ours ÷ theirs, pair by pair: median {statistics.median(ratios):.2f},"
              f" {ratios[0]:.2f} to {ratios[-1]:.2f}")  # fmt: skip


@torch.no_grad()
def generation(batch_size: int) -> float:
    """Tokens per second of decoding behind a short prompt."""
    shape = shape_for("nanochat", LAYERS, width=WIDTH, heads=HEADS, vocab_size=VOCAB, context_len=T)
    model = build_for_generation(shape, runtime(), "fp32", "cpu")
    set_weights(model, 0)
    cache = KVCache(shape, batch_size, PROMPT + NEW, torch.float32, "cpu")
    generator, sampling = torch.Generator().manual_seed(0), Sampling()
    tokens = torch.randint(VOCAB, (batch_size, PROMPT))
    tokens = choose(model.next_logits(tokens, cache), sampling, generator)
    began = time.perf_counter()
    for _ in range(NEW - 1):
        tokens = choose(model.next_logits(tokens, cache), sampling, generator)
    return batch_size * (NEW - 1) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanochat", help="path of a checkout")
    checkout = parser.parse_args().nanochat
    makers = {"snugpt": our_step}
    if checkout:
        sys.path.insert(0, checkout)
        makers["nanochat, eager"] = their_step
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32")
    training(makers)
    print(f"{'generation, ' + str(NEW) + ' new tokens':32} tokens/s")
    for batch_size in (1, 8, 32):
        rate = statistics.median(generation(batch_size) for _ in range(3))
        print(f"{'snugpt, batch ' + str(batch_size):32} {rate:8,.0f}")


if __name__ == "__main__":
    main()

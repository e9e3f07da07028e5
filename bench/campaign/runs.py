"""Whole runs in a child process: training, generation, nanochat's own code, and the machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from campaign.counters import (
    CpuPhases,
    CudaPhases,
    driver_reading,
    driver_use,
    kernels_of,
    part,
    peaks,
    start_history,
    write_history,
)
from campaign.jobs import Environment, Generation, Peer, Training
from snugpt.model.build import build_for_generation, build_for_training, set_weights
from snugpt.model.gpt import DTYPES
from snugpt.model.kv_cache import KVCache
from snugpt.model.optimizers import optimizers_for
from snugpt.model.sampling import Sampling, choose
from snugpt.model.step import Batch, evaluate_batch, no_mark, step
from snugpt.run.cpu_allocations import CpuAllocations
from snugpt.run.watch import is_out_of_memory

LARGEST_HISTORY_BYTES = 16 * 2**20
LONGEST_REASON = 400  # characters


class Count:
    """Counting around a run on either device: `with Count(device) as count: ... count.mark(p)`."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = driver_use()[0] if device == "cuda" else None
        self.cpu = CpuAllocations(keep_events=False)
        self.phases: CudaPhases | CpuPhases = (
            CudaPhases() if device == "cuda" else CpuPhases(self.cpu)
        )
        self.mark = self.phases.mark
        self.driver: dict[str, Any] | None = None

    def __enter__(self) -> Count:
        if self.device == "cuda":
            torch.cuda.init()
            torch.empty(1, device="cuda")
            self.context = driver_reading(self.before)
            torch.cuda.empty_cache()
        else:
            self.cpu.__enter__()
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if self.device != "cuda":
            self.cpu.__exit__(kind, *rest)
        elif kind is None:
            torch.cuda.synchronize()
            self.mark(None)
            self.driver = driver_reading(self.before)

    def summary(self) -> dict[str, Any]:
        """The peaks, and what the driver saw at the end, when nothing was given back."""
        found = self.phases.summary()
        if self.device == "cuda":
            found |= {"driver": self.driver, "context": self.context}
        return found


def training(job: Training) -> dict[str, Any]:
    """Peaks of steps 2 to `steps` and of an evaluation batch, then times, then kernel names."""
    recipe = job.recipe
    bound_memory(job.device, job.cap_bytes)
    with Count(job.device) as count:
        if job.snapshot and job.device == "cuda":
            start_history()
        model = build_for_training(job.shape, recipe, job.runtime, device=job.device, seed=0)
        optimizers = optimizers_for(model, recipe)
        weights_bytes = allocated_now(job.device)
        batch_of = random_batches(recipe.device_batch_size, recipe.seq_len,
                                  job.shape.vocab_size, job.device)  # fmt: skip
        take = partial(step, model, optimizers, recipe, batch_of)
        take()
        for _ in range(job.steps - 1):
            take(count.mark)  # step 1 made the optimizer's state
        count.mark("evaluate")
        evaluate_batch(model.eval(), recipe, batch_of(0))
        model.train()
    found = count.summary() | {"built_bytes": weights_bytes}
    refuse_above(job.device, job.cap_bytes, found["allocated_bytes"])
    missing: dict[str, str] = {}
    if job.snapshot and job.device == "cuda":
        path = Path(job.snapshot)
        found["snapshot"] = part(missing, "snapshot", lambda: history(path, count.phases.marks))
    if job.cap_bytes is None:
        found["step_ms"] = part(missing, "step_ms", lambda: times(take, job.timed_steps,
                                                                  job.device))  # fmt: skip
        found["ran"] = part(missing, "ran", lambda: kernels_of(take, job.device))
    return found | {"missing": missing}


@torch.no_grad()
def generation(job: Generation) -> dict[str, Any]:
    """Peaks of the prefill and of decoding to the end of the cache."""
    recipe, shape = job.recipe, job.shape
    dtype = DTYPES[recipe.weight_dtype]
    sampling = Sampling()
    with Count(job.device) as count:
        model = build_for_generation(shape, job.runtime, recipe.weight_dtype, job.device)
        set_weights(model, 0)
        built = allocated_now(job.device)
        generator = torch.Generator(job.device).manual_seed(0)
        cache = KVCache(shape, recipe.batch, recipe.cache_len, dtype, job.device)

        def once(mark: Callable[[str], None]) -> None:
            cache.length = 0
            mark("prefill")
            tokens = torch.empty(recipe.batch, recipe.prompt_tokens, dtype=torch.int64,
                                 device=job.device).random_(0, shape.vocab_size)  # fmt: skip
            for number in range(recipe.max_new_tokens):
                if number == 1:
                    mark("decode")
                logits = model.next_logits(tokens, cache)
                tokens = choose(logits, sampling, generator)
                del logits

        once(count.mark)
    missing: dict[str, str] = {}
    found = count.summary() | {"built_bytes": built}
    found["generate_ms"] = part(missing, "generate_ms", lambda: times(lambda: once(no_mark), 2,
                                                                      job.device))  # fmt: skip
    found["ran"] = part(missing, "ran", lambda: kernels_of(lambda: once(no_mark), job.device))
    return found | {"missing": missing}


def peer(job: Peer) -> dict[str, Any]:
    """Forward, backward and optimizer of nanochat's model and optimizer, from a checkout.

    Its code is imported and not copied; there is no clipping and no evaluation. Versions before
    March 2026 compute under autocast; later ones say their dtype in `nanochat.common`.
    """
    sys.path.insert(0, job.checkout)
    import nanochat.common as common
    from nanochat.gpt import GPT, GPTConfig

    heads = max(1, 64 * job.depth // 128)
    sizes = {
        "sequence_len": job.seq_len, "vocab_size": job.vocab_size, "n_layer": job.depth,
        "n_head": heads, "n_kv_head": heads, "n_embd": 128 * heads,
        "window_pattern": job.window_pattern,
    }  # fmt: skip
    known = GPTConfig.__dataclass_fields__
    config = GPTConfig(**{name: value for name, value in sizes.items() if name in known})
    with Count(job.device) as count:
        with torch.device("meta"):
            model = GPT(config)
        model.to_empty(device=job.device)
        model.init_weights()
        setup = getattr(model, "setup_optimizer", None) or model.setup_optimizers
        made = setup()
        optimizers = made if isinstance(made, list | tuple) else [made]
        built = allocated_now(job.device)
        run = torch.compile(model, dynamic=False) if job.compiled else model
        batch_of = random_batches(job.device_batch_size, job.seq_len, job.vocab_size, job.device)
        batch = batch_of(0)

        def take(mark: Callable[[str], None] = no_mark) -> None:
            nonlocal batch
            for _ in range(job.accumulation):
                mark("forward")
                with autocast(common, job.device):
                    loss = run(*batch)
                loss = loss / job.accumulation
                mark("backward")
                loss.backward()
                batch = batch_of(0)
            mark("optimizer")
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)

        take()
        for _ in range(job.steps - 1):
            take(count.mark)
    missing: dict[str, str] = {}
    found = count.summary() | {"built_bytes": built}
    found["step_ms"] = part(missing, "step_ms", lambda: times(take, 3, job.device))
    found["ran"] = part(missing, "ran", lambda: kernels_of(take, job.device))
    return found | {"missing": missing}


def autocast(common: Any, device: str) -> AbstractContextManager[object]:
    """bf16 autocast where the checkout is from the time it used it."""
    if device != "cuda" or hasattr(common, "COMPUTE_DTYPE"):
        return nullcontext()
    return torch.amp.autocast(device_type=device, dtype=torch.bfloat16)


def machine(job: Environment) -> dict[str, Any]:
    """The card, its memory, the context's bytes and the libraries' workspaces, measured."""
    if job.device == "cpu":
        return {"num_threads": torch.get_num_threads()}
    before, counted_by = driver_use()
    torch.cuda.init()
    torch.empty(1, device="cuda")
    started = driver_reading(before)
    properties = torch.cuda.get_device_properties(0)
    workspaces = {
        "cublas_bf16": first_call(lambda a: a @ a, torch.bfloat16),
        "cublas_fp32": first_call(lambda a: a @ a, torch.float32),
        "cublas_lt_bf16": first_call(lambda a: torch.addmm(a[0], a, a), torch.bfloat16),
        "cublas_bf16_of_the_backward_thread": first_call(backward_product, torch.bfloat16),
    }
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "total_bytes": properties.total_memory,
        "num_multiprocessors": properties.multi_processor_count,
        "before_context_bytes": before,
        "counted_by": counted_by,
        "context": started,
        "workspaces": workspaces,
        "after_products": driver_reading(before),
    }


def backward_product(a: torch.Tensor) -> torch.Tensor:
    """A product in autograd's own thread, which has a handle of its own: the gradient of a @ a."""
    a = a.detach().requires_grad_()
    (grad,) = torch.autograd.grad((a @ a).sum(), a)
    return grad


def first_call(call: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> int:
    """Bytes that a library took for itself at the first product of a dtype."""
    a = torch.randn(64, 64, device="cuda").to(dtype)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = call(a)
    torch.cuda.synchronize()
    own = -(-out.numel() * out.element_size() // 512) * 512
    return torch.cuda.memory_allocated() - before - own


def ended_by(error: Exception) -> dict[str, Any]:
    """Out of memory, with the allocator's peaks where there are any, or a failure."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]
    full = is_out_of_memory(error)
    counted = peaks() if full and torch.cuda.is_initialized() else None
    return {"outcome": "oom" if full else "failed", "reason": reason, "measured": counted}


def random_batches(batch: int, length: int, vocab: int, device: str) -> Callable[[int], Batch]:
    """Random tokens and targets, made in place so that nothing else is allocated."""

    def batch_of(_: int) -> Batch:
        tokens, targets = (
            torch.empty((batch, length), dtype=torch.int64, device=device).random_(0, vocab)
            for _ in range(2)
        )
        return tokens, targets

    return batch_of


def times(take: Callable[[], object], count: int, device: str) -> list[float]:
    """Milliseconds of each of `count` calls, by CUDA's own events on a card."""
    found = []
    for _ in range(count):
        if device == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            take()
            last.record()
            torch.cuda.synchronize()
            found.append(round(first.elapsed_time(last), 3))
        else:
            began = time.perf_counter()
            take()
            found.append(round(1e3 * (time.perf_counter() - began), 3))
    return found


def history(path: Path, marks: list[tuple[int, str]]) -> dict[str, Any]:
    """Write the allocator's history beside the records; too large a file is taken back."""
    size = write_history(path, marks)
    if size > LARGEST_HISTORY_BYTES:
        path.unlink()
        raise ValueError(f"{size} bytes compressed, more than {LARGEST_HISTORY_BYTES}")
    return {"file": path.name, "bytes": size}


def allocated_now(device: str) -> int | None:
    """What the card's allocator has given out; the CPU's does not say before the end."""
    return torch.cuda.memory_allocated() if device == "cuda" else None


def bound_memory(device: str, cap_bytes: int | None) -> None:
    """Bound what PyTorch's allocator may hold on a card, so that a small boundary can be found."""
    if cap_bytes is not None and device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap_bytes / total)


def refuse_above(device: str, cap_bytes: int | None, peak_bytes: int) -> None:
    """On the CPU, where nothing bounds the allocator, count afterwards what would have been full.

    Raises:
        MemoryError: the peak is above the cap.
    """
    if cap_bytes is not None and device == "cpu" and peak_bytes > cap_bytes:
        raise MemoryError(f"counted afterwards: {peak_bytes} bytes, the cap is {cap_bytes}")

"""Our own step and our own generation, traced: the code that runs, on the meta device.

The second step is kept: optimizer state comes into being at the end of the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from msgspec.structs import replace
from torch import Tensor

import snugpt.model
from snugpt.errors import BadQuestionError
from snugpt.estimate import scratch
from snugpt.estimate.timeline import Timeline
from snugpt.model.build import build_for_generation, build_for_training, group_of
from snugpt.model.gpt import DTYPES, GPT
from snugpt.model.kv_cache import KVCache
from snugpt.model.muon import Muon
from snugpt.model.optimizers import optimizers_for
from snugpt.model.parameter_wise import ParameterWise
from snugpt.model.sampling import Sampling, choose
from snugpt.model.step import Batch, evaluate_batch, step
from snugpt.model.stored_state import Int8
from snugpt.spec.memory import Category
from snugpt.spec.recipe import GenerationRecipe, Recipe, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape
from snugpt.tracing.allocations import Allocations
from snugpt.tracing.kernels import kernels_of, scratch_of
from snugpt.tracing.ranks import pretended_ranks

NOT_TRACED = "compile = 'on' is not traced: what is compiled runs on its GPU only"
OPTIMIZER_FILES = {
    "adamw.py", "muon.py", "parameter_wise.py", "state_on_host.py", "stochastic_rounding.py",
    "stored_state.py",
}  # fmt: skip
MODEL_FOLDER = str(Path(snugpt.model.__file__).parent)


class StepAllocations(Allocations):
    """Allocations of our own code, told apart as the walk tells them."""

    def __init__(self, shape: ModelShape, runtime: Runtime) -> None:
        super().__init__(scratch_of(runtime), MODEL_FOLDER)
        self._model_dim = shape.model_dim

    def category_of(self, tensor: Tensor, site: str) -> Category:
        """Logits and what is made of them by the file; scratch of the optimizer and of clipping."""
        _, _, line = site.rpartition(" ")
        file = line.partition(":")[0]
        if file in ("loss.py", "sampling.py"):
            rows_of_channels = tensor.dim() > 1 and tensor.shape[-1] == self._model_dim
            return "activations" if rows_of_channels else "logits"
        if file in OPTIMIZER_FILES:
            return "optimizer"
        return "gradients" if self.phase == "clip" else "activations"


def trace(shape: ModelShape, recipe: Recipe, runtime: Runtime) -> Timeline:
    """Run one step of a recipe without memory; return its timeline, as `estimate` predicts it."""
    traced = trace_generation if isinstance(recipe, GenerationRecipe) else trace_training
    return traced(shape, recipe, runtime)  # type: ignore[arg-type]


def trace_training(
    shape: ModelShape,
    recipe: TrainingRecipe,
    runtime: Runtime,
    most_micro_steps: int = 2,
    rank: int | None = None,
) -> Timeline:
    """The second step and an evaluation batch after it.

    From the second micro-step on they are all alike: two stand for more. Of several devices one is
    traced, by default the rank that keeps most; what the others would send comes from nowhere.

    Raises:
        BadQuestionError: the recipe compiles.
    """
    if recipe.compile == "on":
        raise BadQuestionError(NOT_TRACED, hint="snugpt trace --depth 12 --compile off")
    if recipe.grad_accum_steps > most_micro_steps:
        tokens = most_micro_steps * recipe.micro_batch_tokens * recipe.world_size
        recipe = replace(recipe, grad_accum_steps=most_micro_steps, total_batch_tokens=tokens)

    def batch(rows: int) -> Batch:
        size = rows, recipe.seq_len
        tokens, targets = (torch.empty(size, dtype=torch.int64, device="meta") for _ in range(2))
        allocations.label(tokens, "batch", "tokens")
        allocations.label(targets, "batch", "targets")
        return tokens, targets

    def batch_of(_: int) -> Batch:
        return batch(recipe.device_batch_size)

    allocations = StepAllocations(shape, runtime)
    with (
        pretended_ranks(shape, recipe, rank),
        kernels_of(runtime),
        _random_states_seen(allocations, runtime),
        allocations,
    ):
        model = build_for_training(shape, recipe, runtime, device="meta")
        optimizers = optimizers_for(model, recipe)
        step(model, optimizers, one_row(recipe), lambda _: batch(1))
        _label_weights(allocations, model)
        _label_states(allocations, optimizers)
        _tell_workspaces(allocations, runtime, num_threads=2)
        allocations.begin("forward")
        step(model, optimizers, recipe, batch_of, allocations.mark)
        allocations.mark("evaluate")
        evaluate_batch(model.eval(), recipe, batch_of(0))
    return allocations.timeline(runtime.block_bytes)


def one_row(recipe: TrainingRecipe) -> TrainingRecipe:
    """A recipe whose step is as small as can be: enough for the optimizers to make their state."""
    return replace(
        recipe, device_batch_size=1, grad_accum_steps=1,
        total_batch_tokens=recipe.seq_len * recipe.world_size,
    )  # fmt: skip


@torch.no_grad()
def trace_generation(shape: ModelShape, recipe: GenerationRecipe, runtime: Runtime) -> Timeline:
    """Reading the prompt, and the last token at the full cache."""

    def take(tokens: Tensor) -> Tensor:
        return choose(model.next_logits(tokens, cache), Sampling(), None)

    with kernels_of(runtime), StepAllocations(shape, runtime) as allocations:
        model = build_for_generation(shape, runtime, recipe.weight_dtype, "meta")
        dtype = DTYPES[recipe.kv_dtype]
        cache = KVCache(shape, recipe.batch, recipe.cache_len, dtype, "meta")
        _label_weights(allocations, model)
        allocations.label(cache.keys, "kv_cache", "keys")
        allocations.label(cache.values, "kv_cache", "values")
        _tell_workspaces(allocations, runtime, num_threads=1)
        allocations.begin("prefill")
        prompt = torch.empty(recipe.batch, recipe.prompt_tokens, dtype=torch.int64, device="meta")
        allocations.label(prompt, "batch", "tokens")
        tokens = take(prompt)
        del prompt
        cache.length = recipe.cache_len - 1
        allocations.mark("decode")
        take(tokens)
    return allocations.timeline(runtime.block_bytes)


@contextmanager
def _random_states_seen(allocations: Allocations, runtime: Runtime) -> Iterator[None]:
    """Record the CPU's random states, which a checkpoint keeps and puts aside: none is dispatched,
    and on the meta device nothing is put aside. On CUDA they are in host memory and do not count.
    """
    if runtime.device != "cpu":
        yield
        return
    plain_state, plain_fork = torch.get_rng_state, torch.random.fork_rng

    def state_seen() -> Tensor:
        state = plain_state()
        allocations.label(state, "activations", "random states")
        return state

    def fork_as_cpu(devices=None, enabled=True, device_type=None):
        return plain_fork(devices=devices, enabled=enabled, device_type="cpu")

    torch.get_rng_state, torch.random.fork_rng = state_seen, fork_as_cpu
    try:
        yield
    finally:
        torch.get_rng_state, torch.random.fork_rng = plain_state, plain_fork


def _label_weights(allocations: Allocations, model: GPT) -> None:
    for name, weight in model.named_parameters():
        allocations.label(weight, "weights", f"weights: {group_of(name)}")
        if weight.requires_grad:
            weight.register_hook(lambda grad: allocations.label(grad, "gradients", "gradients"))
    for table in model.angles or ():
        allocations.label(table, "weights", "rotary tables")
    for mask in model.masks.values():
        allocations.label(mask, "weights", "window masks")


def _label_states(allocations: Allocations, optimizers: list[ParameterWise]) -> None:
    for optimizer in optimizers:
        muon = isinstance(optimizer, Muon)
        for state in optimizer.state.values():
            for name, tensor in state.items():
                if name.endswith("_scale"):
                    said = "Muon scales" if muon else "AdamW scales"
                elif muon:
                    said = "Muon momentum"
                else:
                    said = "AdamW counters" if name == "step" else "AdamW moments"
                allocations.label(tensor, "optimizer", said)
        for stage in optimizer.on_host.stages if optimizer.on_host else ():
            allocations.label(stage.buffer, "optimizer", "optimizer stages")
        for stored in optimizer.formats.values():
            for tables in stored.tables.values() if isinstance(stored, Int8) else ():
                for table in tables:
                    allocations.label(table, "weights", "int8 tables")


def _tell_workspaces(allocations: Allocations, runtime: Runtime, num_threads: int) -> None:
    """cuBLAS keeps one workspace for each thread that multiplies."""
    if runtime.device == "cuda":
        for _ in range(num_threads):
            size = scratch.cublas_workspace(runtime.capability)
            allocations.tell(size, "workspace", "cuBLAS workspace")

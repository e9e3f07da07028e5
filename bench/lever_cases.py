"""What `lever_exactness.py` and `lever_costs.py` train: every lever that snugpt has, one at a time.

The list is made from `SNUGPT.levers`: a lever that the trainer learns is measured from then on.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from snugpt.data.builtin import builtin_documents
from snugpt.data.loader import TrainingLoader, ValidationLoader
from snugpt.estimate.levers import why_not
from snugpt.estimate.memory import runtime_of
from snugpt.estimate.stacks.catalogue import SNUGPT
from snugpt.model.build import build_for_training
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import evaluate_batch, step
from snugpt.planner.levers import is_exact
from snugpt.planner.machine import machine_for
from snugpt.planner.pulled import values
from snugpt.run.learning_rate import rate_factor, set_rates
from snugpt.spec.gpu import Gpu
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

BYTES_OF_TEXT = 256  # vocabulary: one token per byte
VALIDATION_SHARE = 20
EMULATED = {"fp8", "offload", "compute_dtype"}  # of CUDA; the CPU computes the same numbers
PROCESSOR = machine_for("cpu").gpu


@dataclass(frozen=True)
class Case:
    """A recipe with one lever pulled, and the one it is compared with.

    `exact` is what the lever promises; `refused` says why it can't be pulled here.
    """

    name: str
    recipe: TrainingRecipe
    beside: TrainingRecipe
    exact: bool
    refused: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)


def cases(shape: ModelShape, plain: TrainingRecipe, gpu: Gpu = PROCESSOR) -> Iterator[Case]:
    """Yield every lever on `plain`: first what only sums in another order, which is the measure."""
    halves = replaced(plain, device_batch_size=plain.device_batch_size // 2, grad_accum_steps=2)
    yield Case("half the batch twice", halves, plain, True)
    for changes in values():
        if any(getattr(plain, name) != value for name, value in changes.items()):
            yield _case(shape, plain, dict(changes), gpu)
    for dtype in SNUGPT.levers["compute_dtype"]:
        if dtype != plain.compute_dtype:
            yield _case(shape, plain, {"compute_dtype": dtype}, gpu)
    free = msgspec.structs.replace(plain.schedule, clip_norm=0.0)
    at_once, later = replaced(plain, schedule=free), replaced(halves, schedule=free)
    if at_once.steps_in_backward:
        yield Case("updated in backward", at_once, later, True, changes={"clip_norm": 0.0})


def divided(plain: TrainingRecipe) -> Iterator[Case]:
    """Yield the steps of two processes that the trainer can take, each on half of the rows."""
    if SNUGPT.most_gpus < 2:
        return
    for sharding in SNUGPT.levers["sharding"]:
        recipe = msgspec.structs.replace(
            plain, world_size=2, launcher="torchrun", sharding=sharding,
            device_batch_size=plain.device_batch_size // 2,
        )  # fmt: skip
        changes = {"sharding": sharding, "world_size": 2}
        yield Case(f"2 processes, sharding {sharding}", recipe, plain, True, changes=changes)


def _case(shape: ModelShape, plain: TrainingRecipe, changes: dict[str, Any], gpu: Gpu) -> Case:
    recipe = replaced(plain, **changes)
    objection = why_not(shape, recipe, runtime_on(gpu, shape, recipe))
    if objection is not None and objection.lever not in EMULATED:
        in_bf16 = replaced(recipe, compute_dtype="bf16")
        if why_not(shape, in_bf16, runtime_on(gpu, shape, in_bf16)) is None:
            recipe, objection = in_bf16, None
            changes = {**changes, "compute_dtype": "bf16"}
    else:
        objection = None
    exact = is_exact(recipe) and recipe.compute_dtype == plain.compute_dtype
    refused = objection.because if objection else None
    return Case(in_words(changes), recipe, plain, exact, refused, changes)


def runtime_on(gpu: Gpu, shape: ModelShape, recipe: TrainingRecipe) -> Runtime:
    """What a recipe runs on a device with, with torch's number of threads."""
    return runtime_of(shape, recipe, gpu, torch.get_num_threads())


def in_words(changes: dict[str, Any]) -> str:
    """The changes of a recipe as they are said: selective qkv+up, state_dtype int8."""
    shown = dict(changes)
    steps = shown.pop("selective_steps", ())
    if steps:
        shown["checkpoint"] = f"selective {'+'.join(steps)}"
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def replaced(recipe: TrainingRecipe, **changes: Any) -> TrainingRecipe:
    """The recipe with other levers and as many tokens."""
    return msgspec.structs.replace(recipe, **changes)


def plain_recipe(
    seq_len: int, batch: int, steps: int, *, optimizer: str = "muon", chunk: int = 96
) -> TrainingRecipe:
    """fp32, no lever pulled: whole logits, everything kept, one pass to a step."""
    schedule = Schedule(
        learning_rate=2e-3, matrix_learning_rate=0.02, weight_decay=0.1, warmup_fraction=0.05,
        cooldown_fraction=0.4, final_fraction=0.1, clip_norm=1.0, seed=0, eval_every_steps=steps,
        eval_tokens=seq_len, save_every_steps=steps,
    )  # fmt: skip
    return TrainingRecipe(
        seq_len=seq_len, device_batch_size=batch, grad_accum_steps=1,
        total_batch_tokens=batch * seq_len, total_tokens=steps * batch * seq_len,
        compute_dtype="fp32", loss="plain", loss_chunk_tokens=chunk, checkpoint="none",
        optimizer=optimizer, schedule=schedule,
    )  # fmt: skip


@cache
def corpus() -> np.ndarray:
    """The built-in corpus, one token per byte."""
    documents = builtin_documents(Path(sysconfig.get_path("stdlib")))
    return np.frombuffer("\0".join(documents).encode(), dtype=np.uint8)


class Training:
    """A model with its optimizers and batches on a device; the seed sets weights and rows."""

    def __init__(
        self,
        shape: ModelShape,
        recipe: TrainingRecipe,
        tokens: np.ndarray,
        seed: int = 0,
        *,
        device: torch.device | str = "cpu",
        gpu: Gpu = PROCESSOR,
        rank: int = 0,
    ) -> None:
        cut = len(tokens) - len(tokens) // VALIDATION_SHARE
        schedule = msgspec.structs.replace(recipe.schedule, seed=seed)
        self.recipe = msgspec.structs.replace(recipe, schedule=schedule)
        torch.manual_seed(seed)
        runtime = runtime_on(gpu, shape, recipe)
        self.model = build_for_training(shape, self.recipe, runtime, device=device, seed=seed)
        self.optimizers = optimizers_for(self.model, self.recipe)
        sizes = {
            "seq_len": recipe.seq_len, "device_batch_size": recipe.device_batch_size,
            "device": device,
        }  # fmt: skip
        self.loader = TrainingLoader(
            tokens=tokens[:cut], seed=seed, grad_accum_steps=recipe.grad_accum_steps, rank=rank,
            world_size=recipe.world_size, **sizes,
        )  # fmt: skip
        self.validation = ValidationLoader(tokens=tokens[cut:], max_rows=64, **sizes)
        self.steps = 0

    def take(self) -> torch.Tensor:
        """Take the next step; return its mean loss in nats."""
        self.model.train()
        schedule, number = self.recipe.schedule, self.steps
        set_rates(self.optimizers, rate_factor(schedule, number, self.recipe.num_steps))
        self.steps += 1
        batch_of: Callable[[int], Any] = lambda micro: self.loader.batch(number, micro)  # noqa: E731
        return step(self.model, self.optimizers, self.recipe, batch_of)

    def validated(self) -> float:
        """The mean loss of the validation rows, which are the same for every seed."""
        self.model.eval()
        batches = [self.validation.batch(n) for n in range(self.validation.num_batches)]
        losses = [evaluate_batch(self.model, self.recipe, batch).double() for batch in batches]
        return torch.cat(losses).mean().item()

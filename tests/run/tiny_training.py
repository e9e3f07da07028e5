"""A training small enough to save a thousand times, and children to kill while they save it."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from snugpt.model.build import build_for_training
from snugpt.model.gpt import GPT
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import step
from snugpt.run.checkpoint import load_newest, restore
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape, Style, shape_for

CONTEXT, BATCH, VOCAB = 16, 2, 64
FAILED_CHILD = 70


class TinyTraining:
    """Model, optimizers and batches; `take(n)` trains n steps."""

    def __init__(
        self, style: Style = "nanochat", *, width: int = 32, seed: int = 1, **levers: str
    ) -> None:
        dropout = 0.2 if style == "gpt2" else 0.0  # draws from the random state
        self.shape: ModelShape = shape_for(
            style, 2, width=width, heads=2, context_len=CONTEXT, vocab_size=VOCAB, dropout=dropout
        )
        attention = "math" if dropout else "cpu"
        recipe = tiny_recipe("adamw" if style == "gpt2" else "muon")
        self.recipe = msgspec.structs.replace(recipe, **levers)
        runtime = Runtime(device="cpu", attention=attention)
        self.model: GPT = build_for_training(self.shape, self.recipe, runtime, seed=seed)
        self.optimizers = optimizers_for(self.model, self.recipe)
        self.steps = 0

    def take(self, num_steps: int) -> TinyTraining:
        for _ in range(num_steps):
            generator = torch.Generator().manual_seed(self.steps)
            tokens = torch.randint(VOCAB, (BATCH, CONTEXT + 1), generator=generator)
            batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            step(self.model, self.optimizers, self.recipe, lambda _, batch=batch: batch)
            self.steps += 1
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every weight and every tensor of optimizer state."""
        names = {weight: name for name, weight in self.model.named_parameters()}
        found = {name: weight.detach() for weight, name in names.items()}
        for optimizer in self.optimizers:
            for weight, state in optimizer.state.items():
                found |= {f"{names[weight]}/{key}": value for key, value in state.items()}
        return found


def tiny_recipe(optimizer: str) -> TrainingRecipe:
    schedule = Schedule(
        learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.1, warmup_fraction=0.0,
        cooldown_fraction=0.0, final_fraction=1.0, clip_norm=1.0, seed=1, eval_every_steps=1,
        eval_tokens=1, save_every_steps=1,
    )  # fmt: skip
    return TrainingRecipe(
        seq_len=CONTEXT, device_batch_size=BATCH, grad_accum_steps=1,
        total_batch_tokens=BATCH * CONTEXT, total_tokens=6 * BATCH * CONTEXT, compute_dtype="fp32",
        loss="plain", loss_chunk_tokens=BATCH * CONTEXT, checkpoint="none", optimizer=optimizer,
        schedule=schedule,
    )  # fmt: skip


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def loaded_step(folder: Path, expected: dict[int, dict[str, torch.Tensor]]) -> int:
    """The step a restart finds; all its tensors are compared, and no warning is accepted."""
    warned: list[str] = []
    checkpoint = load_newest(folder, warn=warned.append)
    assert checkpoint is not None
    assert not warned
    training = TinyTraining(seed=99)
    restore(checkpoint, training.model, training.optimizers)
    assert_same(training.tensors(), expected[checkpoint.step])
    return checkpoint.step


def fork(work: Callable[[], object]) -> int:
    """Start `work` in a copy of this process that has torch already; return its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of threads beside a fork
        child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)  # the parent's worker threads do not exist here
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(FAILED_CHILD)


def exit_code_of(child: int) -> int:
    """Wait for a child; minus the signal's number if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

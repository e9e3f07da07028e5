"""When a run may save and what it says of itself in a checkpoint; how is in run/checkpoint.py."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from snugpt.data.prepare import PreparedData
from snugpt.errors import FailedError
from snugpt.estimate.parameters import num_parameters
from snugpt.run.checkpoint import DISK_MARGIN_BYTES, Checkpoint, save_checkpoint
from snugpt.run.gathering import gathered
from snugpt.run.progress import diverged
from snugpt.run.reports import Notice, Watcher
from snugpt.run.run_folder import RunFolder
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import ModelShape
from snugpt.units import gib

WEIGHT_BYTES = {"master": 4, "bf16": 2}
MOMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of which each parameter has at least one


class Saver:
    """Saves one run; every checkpoint says which text it was trained on."""

    def __init__(self, folder: RunFolder, data: PreparedData, watcher: Watcher) -> None:
        self.folder, self.watcher = folder, watcher
        self._identities = {
            "tokenizer_sha256": data.tokenizer.sha256,
            "corpus_sha256": data.corpus.sha256,
        }

    def refuse_full_disk(self, shape: ModelShape, recipe: TrainingRecipe) -> None:
        """Say before the first step that the last could not be saved.

        Raises:
            FailedError: there is no room for one checkpoint.
        """
        each_bytes = WEIGHT_BYTES[recipe.weight_dtype] + MOMENT_BYTES[recipe.state_dtype]
        needed_bytes = num_parameters(shape) * each_bytes + DISK_MARGIN_BYTES
        free_bytes = shutil.disk_usage(self.folder.path).free
        if free_bytes < needed_bytes:
            raise FailedError(
                f"a checkpoint needs {gib(needed_bytes)} of disk, {gib(free_bytes)} are free",
                hint=shlex.join(["df", "-h", str(self.folder.path)]),
            )

    def refuse_other_text(self, found: Checkpoint) -> None:
        """Refuse a checkpoint that was trained on other text than this run reads.

        Raises:
            FailedError: it was.
        """
        for what, now in self._identities.items():
            if found.state.get(what, now) != now:
                raise FailedError(
                    f"{self.folder.path} was trained on other text: {what} of step {found.step}"
                    f" is {found.state[what][:12]}, now it is {now[:12]}",
                    hint=f"snugpt train --name {self.folder.path.name}-2",
                )

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        **state: Any,
    ) -> None:
        """Save after `step` steps; `state` is what a resumed run has to know besides.

        Raises:
            FailedError: the disk is full or fails, or a weight is no number; earlier checkpoints
                are as they were.
        """
        self._refuse_broken_weights(step, model)
        self._write(step, model, optimizers, state)

    def save_on_the_way(
        self,
        step: int,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        **state: Any,
    ) -> None:
        """Save; if the disk fails keep what is there, say so and go on: the next save may do.

        Raises:
            FailedError: a weight is no number.
        """
        self._refuse_broken_weights(step, model)
        try:
            self._write(step, model, optimizers, state)
        except FailedError as error:
            self.watcher(Notice(text=f"{error.message}; training goes on"))

    def _write(
        self,
        step: int,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        state: dict[str, Any],
    ) -> None:
        parts = {"tensors": gathered(model, optimizers)} if model.ranks.cuts_state else {}
        if model.ranks.rank == 0:
            said = {**state, **self._identities}
            save_checkpoint(self.folder.checkpoints, step, model, optimizers, said, **parts)

    def _refuse_broken_weights(self, step: int, model: nn.Module) -> None:
        """A checkpoint that is no number would push out a sound one."""
        norm = torch.nn.utils.get_total_norm(model.ranks.parameters(model).values()).item()
        if not math.isfinite(norm):
            raise diverged(self.folder, step, f"the norm of the weights is {norm}")

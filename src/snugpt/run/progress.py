"""How far a run is: the time of its steps, the lines of metrics.jsonl, what the watcher is told."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from snugpt.errors import FailedError
from snugpt.estimate.flops import training_flops_per_token
from snugpt.model.loss_scale import LossScale
from snugpt.run.receipt import MemoryMeter
from snugpt.run.reports import EvaluationReport, Notice, StepReport, Watcher
from snugpt.run.run_folder import RunFolder
from snugpt.spec.plan import Plan
from snugpt.spec.recipe import TrainingRecipe

LOG_EVERY_S = 1.0
LEAST_LOSS_SCALE = 1.0  # 16 halvings below the first


class Progress:
    """Counts the steps that are timed and reports those that are logged.

    `loss` is the last one logged, in nats per token.
    """

    def __init__(
        self,
        plan: Plan,
        recipe: TrainingRecipe,
        folder: RunFolder,
        meter: MemoryMeter,
        watcher: Watcher,
        *,
        writes: bool = True,
    ) -> None:
        self.plan, self.recipe, self.folder = plan, recipe, folder
        self.meter, self.watcher = meter, watcher
        self.loss: float | None = None
        self.loss_scale: LossScale | None = None  # of fp16
        self._train_s = 0.0  # in steps after the metered ones, without evaluation and saving
        self._timed_steps = 0
        self._logged_s = time.perf_counter()
        self._metrics_lost = False
        self._writes = writes  # the first of several ranks

    def timed(self, step_s: float) -> None:
        """Count one step that took `step_s` seconds."""
        self._train_s += step_s
        self._timed_steps += 1

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of the timed steps per second, None before the first; waits for the device."""
        if self._timed_steps == 0:
            return None
        if self.meter.device.type == "cuda":
            torch.cuda.synchronize()
        return self._timed_steps * self.recipe.total_batch_tokens / max(self._train_s, 1e-9)

    def log_if_due(self, step: int, loss: torch.Tensor) -> None:
        """Log step `step` if the last log is long enough ago, or if it is the last step.

        Raises:
            FailedError: the loss is no number any more.
        """
        due_s = self._logged_s + LOG_EVERY_S
        if time.perf_counter() >= due_s or step == self.recipe.num_steps:
            self._log_step(step, loss)
            self._logged_s = time.perf_counter()

    def evaluated(self, step: int, bits_per_byte: float) -> None:
        """Log the evaluation after `step` steps."""
        self.write(kind="evaluation", step=step, bits_per_byte=bits_per_byte)
        self.watcher(EvaluationReport(step=step, bits_per_byte=bits_per_byte))

    def evaluation_of(self, step: int) -> float | None:
        """The bits per byte on record for `step`; None if a signal cut its evaluation short."""
        for line in self.folder.metrics():
            if (line.get("kind"), line.get("step")) == ("evaluation", step):
                return float(line["bits_per_byte"])
        return None

    def write(self, **values: Any) -> None:
        """Add a line to the metrics; a full disk costs the line and one notice, not the run."""
        if not self._writes:
            return
        try:
            self.folder.log(**values)
        except FailedError as error:
            if not self._metrics_lost:
                self.watcher(Notice(text=f"{error.message}; training goes on"))
            self._metrics_lost = True

    def _log_step(self, step: int, loss: torch.Tensor) -> None:
        self.loss = loss.item()
        if not math.isfinite(self.loss):
            raise diverged(self.folder, step, f"loss is {self.loss}")
        scaling = self._scaling(step)
        rate = self.tokens_per_s or 0.0
        left = (self.recipe.num_steps - step) * self.recipe.total_batch_tokens
        allocated, reserved = self.meter.now()
        report = StepReport(
            step=step,
            num_steps=self.recipe.num_steps,
            loss=self.loss,
            tokens_per_s=rate,
            mfu=self._mfu(rate),
            seconds_left=left / rate if rate else math.nan,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
        )
        self.write(kind="step", step=step, loss=self.loss, tokens_per_s=rate or None, **scaling)
        self.watcher(report)

    def _scaling(self, step: int) -> dict[str, float]:
        """The scale of the loss and the steps that were not taken for it; empty but in fp16."""
        if self.loss_scale is None:
            return {}
        scale, _, skipped_steps = self.loss_scale.numbers()
        if scale < LEAST_LOSS_SCALE:
            raise diverged(self.folder, step, "gradients overflow fp16 however they are scaled")
        return {"loss_scale": scale, "skipped_steps": int(skipped_steps)}

    def _mfu(self, tokens_per_s: float) -> float | None:
        peak = self.plan.gpu.flops.get(self.recipe.compute_dtype)
        if peak is None or self.plan.gpu.backend == "cpu":
            return None
        per_token = training_flops_per_token(self.plan.shape, self.recipe.seq_len)
        return tokens_per_s * per_token / peak / self.recipe.world_size


def diverged(folder: RunFolder, step: int, what: str) -> FailedError:
    """Return the error for a run whose numbers are no numbers any more."""
    return FailedError(
        f"{what} after step {step}; earlier checkpoints are kept",
        hint=f"snugpt train --name {folder.path.name}-2 --learning-rate 1e-4",
    )

"""Train a model by its plan: read from top to bottom, this is what a run does.

    prepare text -> lock the folder -> build -> restore -> steps (evaluate, save) -> receipt

Everything that decides the weights is a function of the plan and the step: a run that was killed
and resumed takes the same steps as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from snugpt.data.loader import TrainingLoader, ValidationLoader
from snugpt.data.prepare import PreparedData
from snugpt.errors import DoesNotFitError
from snugpt.model.build import build_for_training
from snugpt.model.gpt import GPT
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import step as take_step
from snugpt.run.checkpoint import Checkpoint, load_newest, restore
from snugpt.run.evaluate import bits_per_byte
from snugpt.run.interrupt import Interrupt
from snugpt.run.learning_rate import rate_factor, set_rates
from snugpt.run.progress import Progress
from snugpt.run.readiness import runnable
from snugpt.run.receipt import MemoryMeter
from snugpt.run.reports import Notice, TrainingResult, Watcher
from snugpt.run.run_folder import RunFolder, training_recipe
from snugpt.run.run_lock import run_lock
from snugpt.run.saving import Saver
from snugpt.run.training_text import prepare_data
from snugpt.run.watch import is_out_of_memory
from snugpt.spec.measurement import Measurement, Outcome
from snugpt.spec.plan import Plan
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import runtime_for
from snugpt.units import gib

METERED_STEPS = 2  # of a new run: optimizer state exists from the second step on


def train(
    plan: Plan,
    folder: RunFolder,
    *,
    cache_dir: Path,
    ledger_folder: Path,
    argv: Sequence[str] = (),
    watcher: Watcher = lambda report: None,
) -> TrainingResult:
    """Train `plan` in `folder`, going on from its newest verified checkpoint if there is one.

    Raises:
        DoesNotFitError: the plan says that it does not fit, or memory ran out; both the run's
            folder and the ledger then hold a measurement with the outcome "oom".
        FailedError: another process trains here, the disk fails, the loss is no number any more.
        BadQuestionError: the text is too short or another plan was run here.
    """
    plan = runnable(plan, watcher)
    recipe = training_recipe(plan)
    with Interrupt() as interrupt:
        folder.check_same(plan, argv)
        data = prepare_data(plan, folder, recipe, cache_dir, watcher)  # refused text leaves no run
        with run_lock(folder.path):
            folder.begin(plan, argv)
            if not folder.tokenizer_file.exists():
                data.tokenizer.save(folder.tokenizer_file)
            run = _Run(plan, recipe, folder, data, interrupt, watcher)
            return run.to_the_end(ledger_folder, argv)


class _Run:
    """The state of one run between its first and its last step."""

    def __init__(
        self,
        plan: Plan,
        recipe: TrainingRecipe,
        folder: RunFolder,
        data: PreparedData,
        interrupt: Interrupt,
        watcher: Watcher,
    ) -> None:
        self.plan, self.recipe, self.folder = plan, recipe, folder
        self.data, self.interrupt, self.watcher = data, interrupt, watcher
        self.device = torch.device("cuda" if plan.gpu.backend == "cuda" else "cpu")
        self.meter = MemoryMeter(self.device)
        self.progress = Progress(plan, recipe, folder, self.meter, watcher)
        self.saver = Saver(folder, data, watcher)
        self.step = 0
        self.bits_per_byte: float | None = None

    def to_the_end(self, ledger_folder: Path, argv: Sequence[str]) -> TrainingResult:
        """Build, restore, take every step that is left, save, and write the receipt."""
        found = load_newest(
            self.folder.checkpoints, warn=lambda line: self.watcher(Notice(text=line))
        )
        if found is not None:
            self.saver.refuse_other_text(found)
            self.step, self.bits_per_byte = found.step, found.state.get("bits_per_byte")
            if self.step >= self.recipe.num_steps and self._was_evaluated():
                self.watcher(Notice(text=f"finished before, after step {self.step}"))
                return self._result(None)
        try:
            self._take_every_step(found)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._receipt(ledger_folder, argv, outcome="oom")
            raise self._out_of_memory() from error
        self.saver.save(self.step, self.model, self.optimizers, **self._state())
        measurement = self._receipt(ledger_folder, argv) if self.meter.complete else None
        return self._result(measurement)

    def _take_every_step(self, found: Checkpoint | None) -> None:
        self.saver.refuse_full_disk(self.plan.shape, self.recipe)
        try:
            self.meter.start()
            self._build(found)
            self._first_steps()
        finally:
            self.meter.stop()
        self._steps()

    def _out_of_memory(self) -> DoesNotFitError:
        batch, memory = self.recipe.device_batch_size, self.plan.memory
        smaller = f"--device-batch-size {batch // 2}" if batch > 1 else "--checkpoint blocks"
        return DoesNotFitError(
            f"out of memory in step {self.step + 1} with device_batch_size = {batch}; predicted"
            f" process {gib(memory.process_bytes.expected)} of {gib(memory.capacity_bytes)};"
            " earlier checkpoints are kept",
            hint=f"{self.plan.command} {smaller}",
        )

    def _was_evaluated(self) -> bool:
        """Whether the step's evaluation is on record; it is not if a signal cut it short."""
        found = self.progress.evaluation_of(self.step)
        if found is not None:
            self.bits_per_byte = found
        return found is not None

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says of this run."""
        return {"bits_per_byte": self.bits_per_byte}

    def _receipt(
        self, ledger_folder: Path, argv: Sequence[str], outcome: Outcome = "fit"
    ) -> Measurement:
        measurement = self.meter.measurement(
            self.plan, argv, outcome, steps=self.step, loss=self.progress.loss,
            bits_per_byte=self.bits_per_byte, tokens_per_s=self.progress.tokens_per_s,
        )  # fmt: skip
        for failure in self.meter.keep(measurement, ledger_folder, self.folder.measurement_file):
            self.watcher(Notice(text=f"measurement not kept: {failure}"))
        return measurement

    def _result(self, measurement: Measurement | None) -> TrainingResult:
        return TrainingResult(
            folder=self.folder,
            steps=self.step,
            finished=self.step >= self.recipe.num_steps,
            interrupted_by=self.interrupt.requested,
            bits_per_byte=self.bits_per_byte,
            measurement=measurement,
        )

    def _build(self, found: Checkpoint | None) -> None:
        shape, recipe = self.plan.shape, self.recipe
        torch.manual_seed(recipe.schedule.seed)
        threads = torch.get_num_threads()
        runtime = runtime_for(self.plan.gpu, recipe.compute_dtype, shape.dropout, threads)
        self.model: GPT = build_for_training(
            shape, recipe, runtime, device=self.device, seed=recipe.schedule.seed
        )
        self.optimizers = optimizers_for(self.model, recipe)
        self.loader = TrainingLoader(
            tokens=self.data.train.tokens, seq_len=recipe.seq_len, seed=recipe.schedule.seed,
            device_batch_size=recipe.device_batch_size, grad_accum_steps=recipe.grad_accum_steps,
            device=self.device,
        )  # fmt: skip
        self.validation = ValidationLoader(
            tokens=self.data.validation.tokens, seq_len=recipe.seq_len,
            device_batch_size=recipe.device_batch_size, device=self.device,
            max_rows=max(1, recipe.schedule.eval_tokens // recipe.seq_len),
        )  # fmt: skip
        if found is not None:
            restore(found, self.model, self.optimizers)
            self.watcher(Notice(text=f"resumed after step {found.step}"))

    def _first_steps(self) -> None:
        """Take the steps that are metered, and one evaluation batch, which may be the peak."""
        if self.step and self._evaluation_is_due() and not self._was_evaluated():
            self._evaluate()
        first_full_step = self.step + (1 if self.step else METERED_STEPS)
        while self.step < first_full_step and not self._stopping():
            loss = self._take_step(self.meter.mark)
            self.meter.mark("evaluate")
            if self.step == first_full_step:
                self._evaluate_one_batch()
                self.meter.stop(complete=True)
            self.progress.log_if_due(self.step, loss)
            self._evaluate_and_save_if_due()

    def _steps(self) -> None:
        while not self._stopping():
            began_s = time.perf_counter()
            loss = self._take_step()
            self.progress.log_if_due(self.step, loss)
            self.progress.timed(time.perf_counter() - began_s)
            self._evaluate_and_save_if_due()

    def _evaluate_and_save_if_due(self) -> None:
        if self._evaluation_is_due():
            self._evaluate()
        last = self.step == self.recipe.num_steps
        if not last and self.step % self.recipe.schedule.save_every_steps == 0:
            self.saver.save_on_the_way(self.step, self.model, self.optimizers, **self._state())

    def _evaluation_is_due(self) -> bool:
        last = self.step == self.recipe.num_steps
        return last or self.step % self.recipe.schedule.eval_every_steps == 0

    def _stopping(self) -> bool:
        return self.step >= self.recipe.num_steps or self.interrupt.requested is not None

    def _take_step(self, mark: Callable[[Any], None] = lambda phase: None) -> torch.Tensor:
        self.model.train()
        set_rates(
            self.optimizers, rate_factor(self.recipe.schedule, self.step, self.recipe.num_steps)
        )
        loss = take_step(
            self.model, self.optimizers, self.recipe,
            lambda micro_step: self.loader.batch(self.step, micro_step), mark,
        )  # fmt: skip
        self.step += 1
        return loss

    def _evaluate(self) -> None:
        found = bits_per_byte(
            self.model, self.recipe, self.validation, self.data.tokenizer.token_bytes,
            stop=lambda: self.interrupt.requested is not None,
        )  # fmt: skip
        if found is not None:
            self.bits_per_byte = found
            self.progress.evaluated(self.step, found)

    def _evaluate_one_batch(self) -> None:
        one = ValidationLoader(
            tokens=self.data.validation.tokens, seq_len=self.recipe.seq_len,
            device_batch_size=self.recipe.device_batch_size, device=self.device,
            max_rows=self.recipe.device_batch_size,
        )  # fmt: skip
        bits_per_byte(self.model, self.recipe, one, self.data.tokenizer.token_bytes)

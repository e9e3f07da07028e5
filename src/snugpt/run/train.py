"""Train a model by its plan: read from top to bottom, this is what a run does.

    prepare text -> lock the folder -> build -> restore -> steps (evaluate, save) -> receipt

Everything that decides the weights is a function of the plan and the step: a run that was killed
and resumed takes the same steps as one that was not.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch

from snugpt.data.loader import TrainingLoader, ValidationLoader
from snugpt.data.prepare import PreparedData
from snugpt.errors import DoesNotFitError, FailedError
from snugpt.estimate.memory import memory_estimate
from snugpt.model.build import build_for_training
from snugpt.model.gpt import GPT
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import step as take_step
from snugpt.run.advice import advice, resumed_line, retry_line, where
from snugpt.run.checkpoint import Checkpoint, load_newest, restore
from snugpt.run.distributed import Alone, joined
from snugpt.run.evaluate import bits_per_byte
from snugpt.run.interrupt import Interrupt
from snugpt.run.learning_rate import rate_factor, set_rates
from snugpt.run.progress import Progress
from snugpt.run.readiness import runnable
from snugpt.run.receipt import MemoryMeter
from snugpt.run.reports import Notice, TrainingResult, Watcher
from snugpt.run.retry import Retries, make_room
from snugpt.run.run_folder import RunFolder, training_recipe
from snugpt.run.run_lock import run_lock
from snugpt.run.saving import Saver
from snugpt.run.training_text import prepare_data
from snugpt.run.watch import is_out_of_memory
from snugpt.spec.measurement import Measurement, Outcome
from snugpt.spec.memory import Phase
from snugpt.spec.plan import Plan
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import runtime_for
from snugpt.units import gib

METERED_STEPS = 2  # of a new run: optimizer state exists from the second step on
MOST_ERROR_TEXT = 400  # characters of PyTorch's words on record


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
        DoesNotFitError: the plan says that it does not fit, or memory ran out and smaller
            micro-batches did not help (run/retry.py); both the run's folder and the ledger then
            hold a measurement with the outcome "oom".
        FailedError: another process trains here, the disk fails, the loss is no number any more.
        BadQuestionError: the text is too short or another plan was run here.
    """
    with joined() as world, Interrupt() as interrupt:
        plan = runnable(plan, watcher)
        recipe = training_recipe(plan)
        folder.check_same(plan, argv)
        data = world.first_then_others(  # refused text leaves no run
            lambda: prepare_data(plan, folder, recipe, cache_dir, watcher)
        )
        with run_lock(folder.path) if world.is_first else nullcontext():
            if world.is_first:
                folder.begin(plan, argv)
                if not folder.tokenizer_file.exists():
                    data.tokenizer.save(folder.tokenizer_file)
            run = _Run(plan, recipe, folder, data, interrupt, watcher, world, ledger_folder, argv)
            return run.to_the_end()


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
        world: Alone,
        ledger_folder: Path,
        argv: Sequence[str],
    ) -> None:
        self.world = world
        self.plan, self.recipe, self.folder = plan, recipe, folder
        self.data, self.interrupt, self.watcher = data, interrupt, watcher
        self.ledger_folder, self.argv = ledger_folder, argv
        self.device = torch.device("cuda" if plan.gpu.backend == "cuda" else "cpu")
        self.meter = MemoryMeter(self.device)
        self.progress = Progress(plan, recipe, folder, self.meter, watcher, writes=world.is_first)
        self.saver = Saver(folder, data, watcher)
        self.retries = Retries(recipe)
        self.built = False
        self.step = 0
        self.bits_per_byte: float | None = None

    def to_the_end(self) -> TrainingResult:
        """Build, restore, take every step that is left, save, and write the receipt."""
        found = self.world.first(
            lambda: load_newest(
                self.folder.checkpoints, warn=lambda line: self.watcher(Notice(text=line))
            )
        )
        if found is not None:
            self.saver.refuse_other_text(found)
            self.step, self.bits_per_byte = found.step, found.state.get("bits_per_byte")
            if self.step >= self.recipe.num_steps and self._was_evaluated():
                self.watcher(Notice(text=f"finished before, after step {self.step}"))
                return self._result(None)
            if self.retries.go_on_from(found.state):
                self._adopt(self.retries.recipe)
        if not self._took_every_step(found):
            raise self._out_of_memory()
        self.saver.save(self.step, self.model, self.optimizers, **self._state())
        measured = self.meter.complete and self.world.is_first
        return self._result(self._receipt() if measured else None)

    def _took_every_step(self, found: Checkpoint | None) -> bool:
        """Take every step that is left; False if memory ran out on the way."""
        self.saver.refuse_full_disk(self.plan.shape, self.recipe)
        try:
            self.meter.start()
            self._build(found)
            if self.step and self._evaluation_is_due() and not self._was_evaluated():
                self._evaluate()
            while not self._stopping():
                self._go_one_step_on()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._note_out_of_memory(error)
            return False  # and so let go of the error, whose frames hold tensors
        finally:
            self.meter.stop()
        return True

    def _go_one_step_on(self) -> None:
        """Take a step, log it, evaluate and save; of the first ones the memory is counted."""
        began_s = time.perf_counter()
        loss = self._take_step()
        metered = not self.meter.complete  # asked now: a retry counts anew
        if metered:
            self._end_metered_step()
        self.progress.log_if_due(self.step, loss)
        if not metered:
            self.progress.timed(time.perf_counter() - began_s)
        self._evaluate_and_save_if_due()

    def _end_metered_step(self) -> None:
        """After the last of them comes one evaluation batch, which may be the peak."""
        self.meter.mark("evaluate")
        if self.step >= self.metered_until:
            self._evaluate_one_batch()
            self.meter.stop(complete=True)

    def _was_evaluated(self) -> bool:
        """Whether the step's evaluation is on record; it is not if a signal cut it short."""
        found = self.progress.evaluation_of(self.step)
        if found is not None:
            self.bits_per_byte = found
        return found is not None

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says of this run."""
        scale = self.model.loss_scale
        scaling = {} if scale is None else {"loss_scale": scale.numbers()}
        return {"bits_per_byte": self.bits_per_byte, **scaling, **self.retries.state}

    def _receipt(self, outcome: Outcome = "fit") -> Measurement:
        measurement = self.meter.measurement(
            self.plan, self.argv, outcome, retries=self.retries.count, steps=self.step,
            loss=self.progress.loss, bits_per_byte=self.bits_per_byte,
            tokens_per_s=self.progress.tokens_per_s,
        )  # fmt: skip
        file = self.folder.measurement_file
        for failure in self.meter.keep(measurement, self.ledger_folder, file):
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
        self._meter_from_here()
        torch.manual_seed(recipe.schedule.seed)
        threads = torch.get_num_threads()
        runtime = runtime_for(self.plan.gpu, recipe.compute_dtype, shape.dropout, threads)
        self.model: GPT = build_for_training(
            shape, recipe, runtime, device=self.device, seed=recipe.schedule.seed
        )
        self.optimizers = optimizers_for(self.model, recipe)
        self.progress.loss_scale = self.model.loss_scale
        self._load_batches()
        if found is not None:
            restore(found, self.model, self.optimizers)
            if self.model.loss_scale is not None:
                self.model.loss_scale.put_back(found.state["loss_scale"])
            self.watcher(Notice(text=resumed_line(found.step, recipe, self.retries)))
        self.built = True

    def _meter_from_here(self) -> None:
        self.metered_until = self.step + (1 if self.step else METERED_STEPS)

    def _load_batches(self) -> None:
        recipe = self.recipe
        self.loader = TrainingLoader(
            tokens=self.data.train.tokens, seq_len=recipe.seq_len, seed=recipe.schedule.seed,
            device_batch_size=recipe.device_batch_size, grad_accum_steps=recipe.grad_accum_steps,
            rank=self.world.rank, world_size=self.world.size, device=self.device,
        )  # fmt: skip
        self.validation = ValidationLoader(
            tokens=self.data.validation.tokens, seq_len=recipe.seq_len,
            device_batch_size=recipe.device_batch_size, device=self.device,
            rank=self.world.rank, world_size=self.world.size,
            max_rows=max(1, recipe.schedule.eval_tokens // recipe.seq_len),
        )  # fmt: skip

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
        return self.step >= self.recipe.num_steps or self._interrupted()

    def _interrupted(self) -> bool:
        """Whether a signal has come, to any rank: all stop at the same place."""
        name = self.interrupt.requested
        number = self.world.highest(signal.Signals[name] if name else 0)
        if number:
            self.interrupt.requested = signal.Signals(number).name
        return number > 0

    def _take_step(self) -> torch.Tensor:
        """Take the next step; in smaller micro-batches if memory runs out and that can help."""
        while True:
            try:
                return self._try_step()
            except (RuntimeError, MemoryError) as error:
                if not (is_out_of_memory(error) and self.retries.possible):
                    raise
                self._note_out_of_memory(error)
            # Out here the error is gone, and with it the frames that held the step's tensors.
            self._make_smaller()

    def _try_step(self) -> torch.Tensor:
        self.retries.begin(self.device)
        self.model.train()
        if self.world.size > 1 and self.plan.shape.dropout:  # each rank drops others, always these
            seed = self.recipe.schedule.seed * 1_000_003 + self.step
            torch.manual_seed((seed * self.world.size + self.world.rank) % 2**63)
        set_rates(
            self.optimizers, rate_factor(self.recipe.schedule, self.step, self.recipe.num_steps)
        )
        loss = take_step(
            self.model, self.optimizers, self.recipe,
            lambda micro_step: self.loader.batch(self.step, micro_step), self._mark,
        )  # fmt: skip
        self.step += 1
        self.retries.end()
        return loss

    def _mark(self, phase: Phase) -> None:
        self.retries.mark(phase)
        if not self.meter.complete:
            self.meter.mark(phase)

    def _note_out_of_memory(self, error: BaseException) -> None:
        """Put it on record, with what PyTorch said of it."""
        self.progress.write(
            kind="out_of_memory", step=self.step + 1, phase=self.retries.phase,
            device_batch_size=self.recipe.device_batch_size, error=str(error)[:MOST_ERROR_TEXT],
        )  # fmt: skip

    def _make_smaller(self) -> None:
        """Change to smaller micro-batches; what they replace goes into the ledger as it is."""
        make_room(self.model, self.device)
        self.meter.stop()
        self._receipt("oom")
        self._adopt(self.retries.make_smaller(self.device))
        self._load_batches()
        self.meter.again()
        self._meter_from_here()
        self.watcher(Notice(text=retry_line(self.plan, self.recipe, self.step, self.retries.phase)))

    def _adopt(self, recipe: TrainingRecipe) -> None:
        """Go on with another recipe, predicted anew."""
        self.recipe = self.progress.recipe = recipe
        memory = memory_estimate(
            self.plan.shape, recipe, self.plan.gpu, num_threads=torch.get_num_threads(),
            capacity_bytes=self.plan.memory.capacity_bytes,
        )  # fmt: skip
        self.plan = msgspec.structs.replace(self.plan, recipe=recipe, memory=memory)

    def _out_of_memory(self) -> DoesNotFitError:
        """End a run that smaller micro-batches could not save: keep the last good step, advise."""
        if self.built:
            make_room(self.model, self.device)
        if self.world.speaks(DoesNotFitError.exit_code):
            self._receipt("oom")
        memory = self.plan.memory
        return DoesNotFitError(
            f"{where(self.step, self.retries.phase)}, device_batch_size ="
            f" {self.recipe.device_batch_size}; predicted process"
            f" {gib(memory.process_bytes.expected)} of {gib(memory.capacity_bytes)};"
            f" {self._last_good_step()}",
            hint=advice(self.plan, self.recipe, self.folder, self.retries.phase),
        )

    def _last_good_step(self) -> str:
        """Save the weights if they are those of a finished step; say what a restart goes on from.

        Half an update is never saved: a restart then goes on from the checkpoint before it.
        """
        if self.built and self.step and self.retries.whole and self.recipe.world_size == 1:
            try:
                self.saver.save(self.step, self.model, self.optimizers, **self._state())
            except (FailedError, RuntimeError, MemoryError) as error:
                self.watcher(Notice(text=f"step {self.step} could not be saved: {error}"))
        found = load_newest(self.folder.checkpoints, warn=lambda line: None)
        if found is None:
            return "no step was saved"
        return f"step {found.step} is saved and verified"

    def _evaluate(self) -> None:
        found = bits_per_byte(
            self.model, self.recipe, self.validation, self.data.tokenizer.token_bytes,
            stop=self._interrupted, sums=self.world.sums,
        )  # fmt: skip
        if found is not None:
            self.bits_per_byte = found
            self.progress.evaluated(self.step, found)

    def _evaluate_one_batch(self) -> None:
        one = ValidationLoader(
            tokens=self.data.validation.tokens, seq_len=self.recipe.seq_len,
            device_batch_size=self.recipe.device_batch_size, device=self.device,
            rank=self.world.rank, world_size=self.world.size,
            max_rows=self.recipe.device_batch_size * self.world.size,
        )  # fmt: skip
        bits_per_byte(
            self.model, self.recipe, one, self.data.tokenizer.token_bytes, sums=self.world.sums
        )

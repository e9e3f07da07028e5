"""The folder of a run: what lies in it and where.

plan.json  argv  tokenizer.json  metrics.jsonl  measurement.json  checkpoints/
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from snugpt.data.durable_file import write_durably
from snugpt.errors import BadQuestionError, FailedError, bad_value
from snugpt.estimate.stacks.catalogue import SNUGPT
from snugpt.spec.plan import Plan, encode_plan, read_plan
from snugpt.spec.recipe import Recipe, TrainingRecipe
from snugpt.spec.shape import ModelShape

RUNS = Path("runs")
MOST_FIELDS = 4  # that differ and are named in one line
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def plan_file(self) -> Path:
        """The plan as it is run."""
        return self.path / "plan.json"

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer of the model."""
        return self.path / "tokenizer.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per logged step and evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def measurement_file(self) -> Path:
        """Predicted against measured, once the run has ended."""
        return self.path / "measurement.json"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints, newest last."""
        return self.path / "checkpoints"

    def plan(self) -> Plan:
        """The plan this run was started with."""
        return read_plan(self.plan_file)

    def begin(self, plan: Plan, argv: Sequence[str]) -> None:
        """Write plan and argv, or check that the ones here are of the same run.

        A run that goes on with other levers has the new plan from here on.

        Raises:
            FailedError: another plan was run here, or the folder can't be written.
        """
        self.check_same(plan, argv)
        if not self.plan_file.exists() or self.plan().recipe != plan.recipe:
            write_durably(self.plan_file, encode_plan(plan))
        _append_line(self.path / "argv", shlex.join(argv).encode("utf-8", "surrogateescape"))

    def check_same(self, plan: Plan, argv: Sequence[str] = ()) -> None:
        """Refuse another plan than the one that was begun here, if one was.

        Levers that leave what is learned alone may differ, tokens per step may not. The
        hint is the command that was given, with another name.

        Raises:
            FailedError: the plan here has another shape or recipe.
        """
        if not self.plan_file.exists():
            return
        before = self.plan()
        for field in ("shape", "recipe"):
            there, here = _learned(getattr(before, field)), _learned(getattr(plan, field))
            if there != here:
                raise FailedError(
                    f"{self.path} holds a run with another {field}: {_apart(there, here)}",
                    hint=_renamed(argv or ("snugpt", "train"), f"{self.path.name}-2"),
                )

    def log(self, **values: Any) -> None:
        """Append one line to metrics.jsonl.

        Raises:
            FailedError: the disk is full or fails.
        """
        _append_line(self.metrics_file, msgspec.json.encode(values))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one cut short by a kill or a full disk is left out."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found


def _learned(part: ModelShape | Recipe) -> ModelShape | Recipe:
    """A shape or a recipe without what may change while a run goes on: how a step is taken.

    The rows of a step stay, however they are divided.
    """
    if not isinstance(part, TrainingRecipe):
        return part
    rows = part.device_batch_size * part.grad_accum_steps * part.world_size
    return msgspec.structs.replace(
        part, device_batch_size=rows, grad_accum_steps=1, world_size=1, loss="chunked",
        loss_chunk_tokens=1, checkpoint="none", selective_steps=(), compile="off", offload="none",
        sharding="none", launcher="python",
    )  # fmt: skip


def _apart(there: ModelShape | Recipe, here: ModelShape | Recipe) -> str:
    """Which fields differ, with both values: "seed 1 there, 2 here"."""
    before, now = _fields(there), _fields(here)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    # Rows of a step follow from its tokens and their length.
    names = [name for name in names if name != "device_batch_size"] or names
    said = [f"{name} {before.get(name)} there, {now.get(name)} here" for name in names]
    more = f"; and {len(said) - MOST_FIELDS} more" if len(said) > MOST_FIELDS else ""
    return "; ".join(said[:MOST_FIELDS]) + more


def _fields(part: ModelShape | Recipe) -> dict[str, Any]:
    """The fields of a shape or of a recipe, those of its schedule among them."""
    fields = msgspec.to_builtins(part)
    schedule = fields.pop("schedule", None) or {}
    return {**fields, **schedule}


def _renamed(argv: Sequence[str], name: str) -> str:
    """A command with another `--name` in the place of its own."""
    words, kept = iter(argv), []
    for word in words:
        if word == "--name":
            next(words, None)
        elif not word.startswith("--name="):
            kept.append(word)
    return shlex.join([*kept, "--name", name])


def _append_line(path: Path, line: bytes) -> None:
    """Add one line; what a kill or a full disk left torn before it is ended first."""
    try:
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line + b"\n")
    except OSError as error:
        raise FailedError(
            f"could not write {path}: {error.strerror or error}",
            hint=shlex.join(["df", "-h", str(path.parent)]),
        ) from None


def folder_for(plan: Plan, name: str | None, runs: Path = RUNS) -> RunFolder:
    """The folder of a run by its name; without one the same plan always gets the same.

    Raises:
        BadQuestionError: the name is not a plain folder name.
    """
    if name is None:
        decided = msgspec.json.encode((plan.shape, plan.recipe, plan.question.input))
        name = f"{plan.shape.style}-{plan.shape.num_layers}x{plan.shape.model_dim}-"
        name += hashlib.sha256(decided).hexdigest()[:6]
    if not NAME.fullmatch(name):
        raise bad_value(
            "name", name, "letters, digits, . _ -, not starting with a mark",
            hint="snugpt train --name my-model",
        )  # fmt: skip
    return RunFolder(runs / name)


def find_run(name: str, runs: Path = RUNS) -> RunFolder:
    """The folder of a trained model, by name under runs/ or by path.

    Raises:
        BadQuestionError: there is no such run.
    """
    for path in (runs / name, Path(name)) if name else ():
        if os.path.isfile(path / "plan.json"):  # False, not an error, for what no file can be named
            return RunFolder(path)
    known = sorted(p.parent.name for p in runs.glob("*/plan.json"))
    listed = f"; {runs}/ has {', '.join(known[:5])}" if known else ""
    hint = f"snugpt generate {known[0]}" if known else "snugpt demo"
    raise BadQuestionError(f"no trained model {name!r}{listed}", hint=hint)


def training_recipe(plan: Plan) -> TrainingRecipe:
    """The recipe of a plan to train.

    Raises:
        BadQuestionError: the plan is one to generate.
    """
    if not isinstance(plan.recipe, TrainingRecipe):
        raise BadQuestionError(
            "the plan is for generating, not training", hint="snugpt plan --task train --json"
        )
    if plan.recipe.stack != "snugpt":
        raise BadQuestionError(
            f"stack = {plan.recipe.stack!r} runs its own program, snugpt trains its own plans only",
            hint=plan.command,
        )
    allowed: dict[str, tuple[object, ...]] = {
        **SNUGPT.levers, "world_size": tuple(range(1, SNUGPT.most_gpus + 1)),
    }  # fmt: skip
    for field, values in allowed.items():
        value = getattr(plan.recipe, field)
        if value not in values:
            raise bad_value(
                field, value, f"snugpt trains with {' and '.join(map(str, values))} only",
                hint="snugpt plan --help",
            )  # fmt: skip
    if plan.recipe.schedule is None:
        raise bad_value("schedule", None, "a plan of snugpt has one", hint="snugpt plan --help")
    return plan.recipe

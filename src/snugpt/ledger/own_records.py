"""Our own records of the GPU campaign, as far as they are graded.

A line is one configuration (`bench/gpu_memory.py`). One with a `measurement` has ratios and a
verdict on its card. One of kind `boundary` has trials at several batches within a cap on what
PyTorch may hold: each is a verdict on the reserved bytes. Anything else is passed over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from snugpt.errors import BadQuestionError, FailedError, bad_line
from snugpt.estimate.memory import memory_estimate
from snugpt.estimate.stacks.catalogue import stack_of
from snugpt.ledger.graded import Graded
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.gpu import Gpu
from snugpt.spec.measurement import Counter, Measurement, measurement_from_json
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.shape import ModelShape

OTHER_FOLDER = "snugpt records accuracy --records PATH/TO/snugpt/records"


class Trial(msgspec.Struct, frozen=True):
    """One batch that was tried within a cap."""

    batch: int
    outcome: Literal["fit", "oom", "failed"]


class Boundary(msgspec.Struct, frozen=True, kw_only=True):
    """Trials of one recipe within `cap_bytes`; the recipe is that of batch 1."""

    cap_bytes: int
    shape: ModelShape
    recipe: TrainingRecipe
    gpu_id: str | None
    gpu_name: str
    trials: tuple[Trial, ...]


class Line(msgspec.Struct, frozen=True):
    """A record of the campaign; a toy, measured on the CPU, is not graded."""

    name: str
    held_out: bool = False
    toy: bool = False
    measurement: msgspec.Raw = msgspec.Raw()
    boundary: Boundary | None = None


class OwnRecord(msgspec.Struct, frozen=True):
    """A line with what was measured."""

    line: Line
    measured: Measurement | Boundary


def own_records(folder: Path) -> list[OwnRecord]:
    """Return the newest record of each configuration in every file; what failed is not one.

    Raises:
        FailedError: a file can't be read, or a line is not a record.
    """
    found: dict[tuple[str, str], OwnRecord] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, text in enumerate(content_of(path).splitlines(), start=1):
            try:
                line = msgspec.json.decode(text, type=Line)
            except msgspec.MsgspecError as error:
                raise bad_line(str(path), number, error) from error
            record = None if line.toy else _record(line)
            if record is not None:
                found[path.name, line.name] = record
    return list(found.values())


def _record(line: Line) -> OwnRecord | None:
    if line.boundary is not None:
        return OwnRecord(line, line.boundary)
    if not bytes(line.measurement):
        return None
    measured = measurement_from_json(bytes(line.measurement))
    return None if measured.outcome == "failed" else OwnRecord(line, measured)


def graded_record(record: OwnRecord) -> list[Graded]:
    """Return the grades of a record by this version; none where its card is not known."""
    if isinstance(record.measured, Boundary):
        return _trials(record.line, record.measured)
    return _counters(record.line, record.measured)


def _counters(line: Line, measured: Measurement) -> list[Graded]:
    """Each counter of a run; the card's verdict goes with the first."""
    card = _card(measured.gpu_id)
    if card is None or measured.shape is None or measured.recipe is None:
        return []
    said = memory_estimate(measured.shape, measured.recipe, card)
    predicted: dict[Counter, int] = {
        "allocated": said.allocated_bytes,
        "reserved": said.reserved_bytes.expected,
        "process": said.process_bytes.expected,
    }
    did_fit = measured.outcome == "fit"
    return [
        Graded(
            id=line.name,
            program=stack_of(measured.recipe).name,
            evidence="our own, held out" if line.held_out else "our own",
            source=measured.id,
            gpu=measured.gpu_name,
            setup=line.name,
            counter=counter,
            predicted_bytes=size,
            measured_bytes=measured.measured_bytes(counter) if did_fit else None,
            said_fits=said.fits if counter == "allocated" else None,
            did_fit=did_fit if counter == "allocated" else None,
        )
        for counter, size in predicted.items()
    ]


def _trials(line: Line, boundary: Boundary) -> list[Graded]:
    """A verdict for each batch: the highest reserved size of the band against the cap."""
    card = _card(boundary.gpu_id)
    if card is None:
        return []
    found = []
    for trial in boundary.trials:
        if trial.outcome != "failed":
            recipe = _at_batch(boundary.recipe, trial.batch)
            reserved = memory_estimate(boundary.shape, recipe, card).reserved_bytes.high
            found.append(
                Graded(
                    id=f"{line.name}, batch {trial.batch}",
                    program=stack_of(recipe).name,
                    evidence="our own, within a cap",
                    source=line.name,
                    gpu=boundary.gpu_name,
                    setup=f"{line.name} B{trial.batch}",
                    counter="reserved",
                    said_fits=reserved <= boundary.cap_bytes,
                    did_fit=trial.outcome == "fit",
                )
            )
    return found


def _at_batch(recipe: TrainingRecipe, batch: int) -> TrainingRecipe:
    tokens = batch * recipe.seq_len * recipe.grad_accum_steps * recipe.world_size
    return msgspec.structs.replace(
        recipe, device_batch_size=batch, total_batch_tokens=tokens, total_tokens=tokens
    )


def _card(gpu_id: str | None) -> Gpu | None:
    return None if gpu_id is None else find_gpu(gpu_id)


def content_of(path: Path) -> bytes:
    """Return a file of records.

    Raises:
        BadQuestionError: it is not there.
        FailedError: it can't be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadQuestionError(
            f"{path} is not there: the records of snugpt come with its source",
            hint=OTHER_FOLDER,
        ) from None
    except OSError as error:
        raise FailedError(
            f"could not read {path}: {error.strerror or error}", hint=f"ls -l {path}"
        ) from error

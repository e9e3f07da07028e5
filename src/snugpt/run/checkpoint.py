"""Checkpoints that a kill at any moment can't spoil.

    <run>/checkpoints/step-00001234/   model.safetensors  optimizer.safetensors  state.json
                                       MANIFEST.json (sizes and hashes of the three, written last)

A save fills `.tmp-<uuid>/`, forces every file to disk, then renames the folder: a reader sees a
whole checkpoint or none. A load trusts nothing it has not hashed. No pickle is written or read.
"""

from __future__ import annotations

import base64
import os
import re
import shlex
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from snugpt.data.durable_file import sync_folder
from snugpt.errors import FailedError, bad_value
from snugpt.model.parameter_wise import ParameterWise
from snugpt.run import manifest
from snugpt.run.manifest import MODEL_FILE, OPTIMIZER_FILE, STATE_FILE
from snugpt.run.tensor_file import opened, optimizer_tensors, tensor_chunks, weights_of
from snugpt.units import MIB, gib

STEP_FOLDER = re.compile(r"step-([0-9]{8,})")
TEMPORARY_PREFIX = ".tmp-"
DISK_MARGIN_BYTES = 16 * MIB  # headers, the state and what else writes to the disk meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint, its tensors still on disk.

    `state` is what the caller of `save_checkpoint` gave, as JSON gives it back. With
    `weights_only` the optimizer's file has not been verified and can't be restored.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    random_state: dict[str, str]
    weights_only: bool


class StateFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of state.json; random states are base64, by kind of device."""

    step: int
    random_state: dict[str, str]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizers: Sequence[ParameterWise],
    state: Mapping[str, Any],
    keep: int = 2,
    tensors: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write `folder`/step-<step> whole or not at all, then delete all but the newest `keep`.

    `state` is any mapping msgspec can write as JSON. `tensors` are weights and optimizer state that
    were gathered from several ranks, where model and optimizers have only some of them. The caller
    holds the run's lock: temporary folders found here count as a dead writer's. A step whose
    checkpoint verifies is not written again. Only checkpoints that verify count as kept, and the
    one just written is never deleted.

    Raises:
        FailedError: the disk is full or fails; earlier checkpoints are as they were.
        BadQuestionError: `keep` is below 1.
    """
    if keep < 1:
        raise bad_value("keep", keep, "at least 1")
    target = folder / f"step-{step:08d}"
    random_state = _random_state(next(model.parameters()).device)
    state_text = msgspec.json.encode(StateFile(step, random_state, dict(state)))
    weights, moments = tensors or (weights_of(model), optimizer_tensors(model, optimizers))
    with _one_line_failure(step, folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        if target.exists():
            if isinstance(_verified(target), Checkpoint):
                return target
            _quarantine(target)
        _check_free_disk(folder, [*weights.values(), *moments.values()])
        with _temporary_folder(folder) as temporary:
            files = {
                MODEL_FILE: manifest.write_recorded(temporary / MODEL_FILE, tensor_chunks(weights)),
                OPTIMIZER_FILE: manifest.write_recorded(
                    temporary / OPTIMIZER_FILE, tensor_chunks(moments)
                ),
                STATE_FILE: manifest.write_recorded(temporary / STATE_FILE, [state_text]),
            }
            manifest.write_manifest(temporary, files)
            temporary.rename(target)
        sync_folder(folder)
        sync_folder(folder.parent)
    _delete_old(folder, target, keep)
    return target


def load_newest(
    folder: Path,
    *,
    warn: Callable[[str], None] = warnings.warn,
    weights_only: bool = False,
) -> Checkpoint | None:
    """Return the newest checkpoint that verifies; None if there is none at all.

    A damaged one is passed over with one line to `warn`, and renamed to step-<n>.corrupt. With
    `weights_only` (generation, beside a trainer that may be at work) the optimizer's file is not
    read and nothing is renamed.

    Raises:
        FailedError: there are checkpoints, and none verifies; they stay as they are.
    """
    damaged: dict[Path, str] = {}
    while True:
        vanished = False
        for path in _newest_first(folder):
            if path in damaged:
                continue
            found = _verified(path, weights_only)
            if isinstance(found, Checkpoint):
                _report(damaged, found, warn, rename=not weights_only)
                return found
            # A trainer deletes old ones while we read; it has written a newer one by then.
            if os.path.lexists(path):
                damaged[path] = found
            else:
                vanished = True
        if not vanished:
            break
    if damaged:
        tried = "; ".join(f"{path.name}: {why}" for path, why in damaged.items())
        raise FailedError(
            f"no checkpoint in {folder} is intact ({tried})",
            hint=shlex.join(["mv", str(folder), f"{folder}.damaged"]),
        )
    return None


def restore(checkpoint: Checkpoint, model: nn.Module, optimizers: Sequence[ParameterWise]) -> None:
    """Put weights, optimizer state and random state back, bit for bit, in place.

    Learning rates and other hyperparameters stay what the optimizers have. The CUDA random state
    returns only where both machines have CUDA.

    Raises:
        FailedError: a name, shape or dtype differs from the model's; nothing has been changed.
    """
    if checkpoint.weights_only:
        raise ValueError("this checkpoint was loaded with weights_only")
    with (
        opened(checkpoint.folder / MODEL_FILE) as weights,
        opened(checkpoint.folder / OPTIMIZER_FILE) as moments,
    ):
        weights.check_weights(model, cast=False)
        moments.check_optimizers(model, optimizers)
        weights.copy_weights(model)
        moments.copy_optimizers(model, optimizers)
    for optimizer in optimizers:
        optimizer.num_steps = checkpoint.step
    _restore_random_state(checkpoint.random_state, next(model.parameters()).device)


def restore_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Put the weights into a model that generates, cast to the dtype it has.

    Raises:
        FailedError: a name or shape differs from the model's; nothing has been changed.
    """
    with opened(checkpoint.folder / MODEL_FILE) as weights:
        weights.check_weights(model, cast=True)
        weights.copy_weights(model)


def remove_stale(folder: Path) -> None:
    """Delete what writers left that died in a save; call it holding the run's lock."""
    for path in folder.glob(TEMPORARY_PREFIX + "*"):
        shutil.rmtree(path, ignore_errors=True)


def _verified(path: Path, weights_only: bool = False) -> Checkpoint | str:
    """The checkpoint at `path`, or what is wrong with it."""
    names = (MODEL_FILE, STATE_FILE) if weights_only else manifest.FILES
    damage = manifest.damage(path, names)
    if damage:
        return damage
    try:
        content = msgspec.json.decode((path / STATE_FILE).read_bytes(), type=StateFile)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        return f"{STATE_FILE}: {error}"
    if path.name != f"step-{content.step:08d}":
        return f"{STATE_FILE} is of step {content.step}"
    return Checkpoint(
        folder=path,
        step=content.step,
        state=content.state,
        random_state=content.random_state,
        weights_only=weights_only,
    )


def _report(
    damaged: Mapping[Path, str], found: Checkpoint, warn: Callable[[str], None], *, rename: bool
) -> None:
    for path, why in damaged.items():
        moved = _quarantine(path) if rename else None
        kept_as = f", kept as {moved.name}" if moved else ""
        warn(f"checkpoint {path} is damaged ({why}){kept_as}; {found.folder.name} is used instead")


def _quarantine(path: Path) -> Path | None:
    """Rename a damaged checkpoint so that no load looks at it again; None if that fails."""
    number = 1
    while True:
        moved = path.with_name(f"{path.name}.corrupt" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(moved):
            break
        number += 1
    with suppress(OSError):
        return path.rename(moved)
    return None


def _newest_first(folder: Path) -> list[Path]:
    """The folders named as checkpoints, whole or not, the highest step first."""
    try:
        paths = list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FailedError(
            f"could not read {folder}: {error.strerror or error}",
            hint=shlex.join(["ls", "-ld", str(folder)]),
        ) from error
    matches = ((STEP_FOLDER.fullmatch(path.name), path) for path in paths)
    steps = [(int(match[1]), path) for match, path in matches if match]
    return [path for _, path in sorted(steps, reverse=True)]


def _delete_old(folder: Path, saved: Path, keep: int) -> None:
    """Delete what is older than the newest `keep` checkpoints that verify, `saved` being one."""
    kept = 1
    # The save is done; what can't be deleted is tried again at the next.
    with suppress(OSError, FailedError):
        for path in _newest_first(folder):
            if path == saved:
                continue
            if kept >= keep:
                # Renamed first: a kill half-way leaves rubbish, not a damaged checkpoint.
                rubbish = path.rename(folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")
                shutil.rmtree(rubbish, ignore_errors=True)
            elif isinstance(_verified(path), Checkpoint):
                kept += 1


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """A new folder that is removed again unless the block renames it."""
    temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _one_line_failure(step: int, folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, FailedError) as error:
        # What failed inside the temporary folder would name a path that no longer exists.
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or cause
        raise FailedError(
            f"could not save step {step} in {folder}: {reason}; earlier checkpoints are untouched",
            hint=shlex.join(["df", "-h", str(folder)]),
        ) from error


def _check_free_disk(folder: Path, tensors: Sequence[Tensor]) -> None:
    needed_bytes = sum(tensor.nbytes for tensor in tensors) + DISK_MARGIN_BYTES
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise FailedError(f"{gib(needed_bytes)} of disk needed, {gib(free_bytes)} free")


def _random_state(device: torch.device) -> dict[str, str]:
    """The state of the generators a run on `device` draws from, as base64."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {kind: base64.b64encode(s.numpy().tobytes()).decode() for kind, s in states.items()}


def _restore_random_state(random_state: Mapping[str, str], device: torch.device) -> None:
    states = {
        kind: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for kind, text in random_state.items()
    }
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)

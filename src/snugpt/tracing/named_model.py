"""Models by name: `package.module:callable`, found from the current directory and traced."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snugpt.errors import BadQuestionError, bad_value, unknown_name
from snugpt.planner.machine import Machine, machine_for
from snugpt.tracing.any_model import Autocast, built, trace
from snugpt.tracing.placing import NoLossError, described
from snugpt.tracing.refusals import Remedy, users_code
from snugpt.tracing.trace_result import Trace

HELP = "snugpt trace --help"
TOKEN_NAMES = ("input_ids", "idx", "tokens", "x", "input", "src")
LABEL_NAMES = ("labels", "targets", "target", "y")
DEFAULT_BATCH, DEFAULT_TOKENS = 8, 1024


def trace_named(
    spec: str,
    *,
    gpu: str | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    dtype: Autocast | None = "auto",
    train: bool = True,
    **options: Any,
) -> Trace:
    """Trace what `package.module:callable` builds; the current directory is searched first.

    The callable (an nn.Module class does too) is called without arguments, on the meta device, and
    returns one of

    - a model: the batch is then made of tokens, (batch_size, seq_len) int64, 8 x 1024 unless said
      otherwise, given as the parameter of `forward` that is named like tokens (input_ids, idx,
      tokens, x, input, src, else the first one), and once more as labels if there is a parameter
      for them (labels, targets, target, y);
    - a pair (model, batch): batch as `snugpt.trace` takes it, also a function of the batch size.

    A callable with a parameter `batch_size` is called once for each size that is traced and returns
    such a pair; its model is taken from the first call. Sizes that nobody gave are a note.

    Raises:
        BadQuestionError: there is no such module or callable, or it returned something else.
        FailedError: the callable or the model raised; the line is named.
    """
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value is not None and value < 1:
            raise bad_value(name, value, "1 or more", hint=Remedy(f"{name}=8", **{name: "8"}))
    machine = machine_for(gpu)
    build = find(spec)
    takes_size = "batch_size" in _parameters(build)
    size = batch_size or DEFAULT_BATCH
    made = built(partial(build, batch_size=size) if takes_size else build, machine)
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise bad_value(
            spec, described(made), "it returns a model or a pair (model, batch)",
            hint=HELP,
        )  # fmt: skip
    if takes_size and batch is not None:
        batch = partial(_batch_of, build, machine)
    makes_tokens = batch is None
    if makes_tokens:
        batch = _tokens(model, seq_len or DEFAULT_TOKENS)
    elif seq_len is not None:
        hint = Remedy("leave seq_len out", seq_len=None)
        raise bad_value("seq_len", seq_len, f"{spec} brings its own batch", hint=hint)
    size_given = size if callable(batch) else batch_size
    try:
        traced = trace(
            model, batch, gpu=gpu, batch_size=size_given, dtype=dtype, train=train, **options
        )
    except NoLossError as error:
        if makes_tokens:
            error.message += f" (labels are given as {', '.join(LABEL_NAMES)})"
        raise
    tokens = (seq_len or DEFAULT_TOKENS) if makes_tokens else None
    assumed = [f"batch {size}"] if callable(batch) and batch_size is None else []
    assumed += [f"{tokens} tokens"] if makes_tokens and seq_len is None else []
    verb = "are" if makes_tokens and seq_len is None else "is"
    notes = (f"{' and '.join(assumed)} {verb} assumed",) if assumed else ()
    return replace(traced, seq_len=tokens, notes=(*notes, *traced.notes))


def find(spec: str) -> Callable[..., Any]:
    """Import the callable that `package.module:callable` names.

    Raises:
        BadQuestionError: it is written wrongly, or there is no such module or callable.
        FailedError: importing the module raised.
    """
    module_name, colon, name = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise bad_value("model", spec, "package.module:callable", hint=HELP)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    _must_exist(module_name, name)
    with users_code(f"importing {module_name}"):
        module = importlib.import_module(module_name)
        found = getattr(module, name, None)
    if found is None:
        known = [each for each, value in vars(module).items() if callable(value)]
        hint = _nearest(name, known, f"{module_name}:{{}}")
        raise unknown_name(f"callable in {module_name}", name, known, hint=hint)
    if not callable(found) or isinstance(found, nn.Module):
        raise bad_value("model", spec, "a function or class that builds a model", hint=HELP)
    return found


def _nearest(name: str, known: list[str], form: str) -> str:
    """A hint that names what may have been meant, as `unknown_name` guesses."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    target = form.format(*found) if found else None
    return Remedy(f"snugpt trace {target}", target=target) if target else HELP


def _must_exist(module_name: str, callable_name: str) -> None:
    """Raise BadQuestionError where a part of the dotted name is not there."""
    parts = module_name.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        above = ".".join(parts[: count - 1])
        with users_code(f"importing {above}"):  # a package above it is run
            if _is_there(name):
                continue
        folder = Path.cwd().joinpath(*parts[: count - 1])
        known = [each.stem for each in folder.glob("*") if each.suffix == ".py" or each.is_dir()]
        kind = f"module in {above}" if above else "module"
        form = ".".join((*parts[: count - 1], "{}", *parts[count:])) + f":{callable_name}"
        hint = _nearest(parts[count - 1], known, form)
        raise unknown_name(kind, parts[count - 1], known, hint=hint)


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name != name:  # the package above misses something else
            raise
        return False
    except ValueError:  # a module without a spec, as __main__
        return False


def _batch_of(build: Callable[..., Any], machine: Machine, size: int) -> Any:
    made = built(partial(build, batch_size=size), machine)
    if not isinstance(made, tuple) or len(made) != 2:
        raise bad_value(
            "model", described(made), f"a pair (model, batch) for batch_size={size} too",
            hint=HELP,
        )  # fmt: skip
    return made[1]


def _tokens(model: Any, seq_len: int) -> Callable[[int], dict[str, torch.Tensor]]:
    """A batch of tokens, and labels if the model takes them, by the names of its parameters."""
    names = _parameters(model.forward)
    inputs = next((name for name in TOKEN_NAMES if name in names), names[0] if names else None)
    if inputs is None:
        raise BadQuestionError("the model's forward takes no argument", hint=HELP)
    labels = next((name for name in LABEL_NAMES if name in names and name != inputs), None)

    def of_size(size: int) -> dict[str, torch.Tensor]:
        tokens = torch.empty(size, seq_len, dtype=torch.int64, device="meta")
        return {name: tokens.clone() for name in (inputs, labels) if name is not None}

    return of_size


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        kinds = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in kinds if each.kind not in positional]

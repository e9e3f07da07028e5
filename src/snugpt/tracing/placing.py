"""Placing: the user's model and batch on the meta device, without touching either.

A model of any size is copied without its data: the copy's parameters and buffers have the shapes,
dtypes and ties of the original.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from snugpt.errors import BadQuestionError, FailedError, bad_value
from snugpt.tracing.refusals import Remedy

META = torch.device("meta")
PARSE_TO = torch._C._nn._parse_to  # what Module.to reads its arguments with
IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
# Code that asks data whether it may save itself work: where it stands, the answer, the assumption.
# Every question of transformers' masking_utils.py (5.23) is whether all of a mask is set, or all of
# the positions are one sequence.
ANSWERED = {
    "transformers/masking_utils.py": (True, "no padding and no packed sequences in the batch")
}
EXAMPLE = 'snugpt.trace(model, {"input_ids": tokens, "labels": tokens})'


class OnDevice(TorchFunctionMode):
    """While code of the model runs: "cuda" means the meta device, and so does a move there.

    A meta tensor says that it `is_cuda`, for models that choose their way by it. Its `device` stays
    "meta", so that what is made on it is traced. Questions of `ANSWERED` are answered; `assumed` is
    what was said.
    """

    def __init__(self, is_cuda: bool) -> None:
        super().__init__()
        self._is_cuda = is_cuda
        self.assumed: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            file = sys._getframe(1).f_code.co_filename.replace("\\", "/")
            for asking, (answer, said) in ANSWERED.items():
                if file.endswith(asking):
                    self.assumed.add(said)
                    return answer
        if func == IS_CUDA and self._is_cuda and args[0].is_meta:
            return True
        if func in (Tensor.data_ptr, Tensor.pin_memory) and args[0].is_meta:
            if func is Tensor.pin_memory:
                return args[0]
            raise RuntimeError("data_ptr of a tensor without data")
        if func is Tensor.cuda:
            return args[0].to(META)
        if func is torch.device:  # a name with or without an index, or the index alone
            first = args[0] if args else kwargs.get("type", kwargs.get("device"))
            if _is_cuda(first) or _is_index(first):
                return META
            return func(*args, **kwargs)
        if func in (Tensor.to, PARSE_TO):
            place = 1 if func is Tensor.to else 0
            if len(args) > place and _is_index(args[place]):
                args = (*args[:place], META, *args[place + 1 :])
        if _is_index(kwargs.get("device")):
            kwargs = {**kwargs, "device": META}
        if any(_is_cuda(each) for each in (*args[1:], kwargs.get("device"), *args[:1])):
            args = tuple(META if _is_cuda(each) else each for each in args)
            kwargs = {name: META if _is_cuda(each) else each for name, each in kwargs.items()}
        return func(*args, **kwargs)


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))


def _is_index(value: Any) -> bool:
    """Whether it is a device by number, which PyTorch takes for the accelerator's."""
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let `torch.compile` hand back what it is given: a trace is of eager code."""
    compiled = torch.compile

    def same(model=None, **_):
        return (lambda function: function) if model is None else model

    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # something was compiled before
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.compile = same  # type: ignore[assignment]
        stack.callback(setattr, torch, "compile", compiled)
        yield


@contextmanager
def building(is_cuda: bool) -> Iterator[None]:
    """While a model is built: every tensor is made on the meta device."""
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.enter_context(OnDevice(is_cuda))
        stack.enter_context(META)
        yield


def model_on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of the model without data.

    Raises:
        BadQuestionError: a parameter is of a class that has no shape of its own.
        FailedError: something in the model can't be copied.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    memo: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor) not in (nn.Parameter, Tensor, nn.Buffer):
            raise BadQuestionError(
                f"{name} is a {type(tensor).__name__}, not a plain parameter", hint=EXAMPLE
            )
        memo[id(tensor)] = _without_data(tensor)
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise FailedError(
            f"the model can't be copied: {' '.join(str(error).split())}",
            hint="give a function that builds it: snugpt.trace(lambda: Model(...), batch)",
        ) from error


def _without_data(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def loose_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the meta tensors that hang on modules without being registered."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith(("_parameters", "_buffers", "_modules")):
                continue
            for each in tree_leaves(value):
                if isinstance(each, Tensor) and each.is_meta:
                    yield f"{path}.{name}".lstrip("."), each


def batch_maker(batch: Any) -> tuple[Callable[[int], Any], int | None]:
    """Return what makes a batch of any size on the meta device, and the size that was given.

    Tensors are scaled along their first dimension where that is the batch size; others stay.

    Raises:
        BadQuestionError: there is no tensor in it.
    """
    if callable(batch) and not isinstance(batch, Mapping):
        return lambda size: _moved(batch(size)), None
    if isinstance(batch, Mapping):  # tokenizers return mappings of their own kind
        batch = dict(batch)
    leaves = [each for each in tree_leaves(batch) if isinstance(each, Tensor) and each.dim()]
    if not leaves:
        raise bad_value(
            "batch", type(batch).__name__, "a tensor, or a dict or tuple with one", hint=EXAMPLE
        )
    given = leaves[0].shape[0]

    def of_size(size: int) -> Any:
        def scaled(each: Any) -> Any:
            if not isinstance(each, Tensor):
                return each
            shape = each.shape
            if each.dim() and shape[0] == given:
                shape = (size, *shape[1:])
            return torch.empty(shape, dtype=each.dtype, device=META)

        return tree_map(scaled, batch)

    return of_size, given


def _moved(batch: Any) -> Any:
    def empty(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        return torch.empty(each.shape, dtype=each.dtype, device=META)

    return tree_map(empty, batch)


def called(model: nn.Module, batch: Any) -> Any:
    """Call the model with the batch: a mapping by name, a tuple or list in order."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def loss_of(output: Any) -> Tensor | None:
    """Return the scalar loss in what a model returned, None where there is none.

    It is looked for as `loss` of a mapping or object, as the first scalar of a tuple or list, or is
    the output itself. A tensor of shape (1,) counts as a scalar.
    """
    found: list[Any] = [output]
    if isinstance(output, Mapping):
        found = [output.get("loss")]
    elif not isinstance(output, Tensor) and hasattr(output, "loss"):
        found = [output.loss]
    elif isinstance(output, tuple | list):
        found = list(output)
    return next((each for each in found if isinstance(each, Tensor) and _is_loss(each)), None)


class NoLossError(BadQuestionError):
    """A training step is asked of a model that returned no scalar loss."""


def no_loss(output: Any, model: nn.Module, batch: Any) -> NoLossError:
    """The error for a training step without a loss: what came back, and what was not given."""
    empty = left_empty(model, batch)
    given = f"; of forward's parameters {', '.join(empty)} got nothing" if empty else ""
    return NoLossError(
        f"the model returned {described(output)}, in which there is no scalar loss{given}",
        hint=Remedy(
            "snugpt.trace(..., loss=lambda output, batch: ...), or labels in the batch",
            task="generate",
        ),
    )


def left_empty(model: nn.Module, batch: Any) -> list[str]:
    """The parameters of forward that a call with `batch` leaves to their defaults."""
    try:
        kinds = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [each.name for each in kinds if each.kind not in many]
    if isinstance(batch, Mapping):
        return [name for name in names if name not in batch]
    return names[len(batch) if isinstance(batch, tuple | list) else 1 :]


def _is_loss(tensor: Tensor) -> bool:
    scalar = tensor.dim() == 0 or tensor.shape == (1,)
    return scalar and tensor.requires_grad and tensor.is_floating_point()


def described(output: Any) -> str:
    """An output in few words: its kind and shapes."""
    kind = type(output).__name__
    if isinstance(output, Tensor):
        shape = " x ".join(map(str, output.shape)) or "of one value"
        without = "" if output.requires_grad else " without a gradient"
        return f"a tensor {shape}{without} ({str(output.dtype).removeprefix('torch.')})"
    if isinstance(output, Mapping):
        return f"{kind} with {', '.join(map(str, output)) or 'nothing'}"
    if isinstance(output, tuple | list):
        return f"{kind} of {', '.join(_short(each) for each in output) or 'nothing'}"
    return "None" if output is None else kind


def _short(value: Any) -> str:
    return described(value) if isinstance(value, Tensor) or value is None else type(value).__name__

"""Tensors on disk: safetensors written one tensor at a time, read back into a model in place.

Weights are stored by parameter name, optimizer state as "adamw/<parameter name>/exp_avg", so that
neither the order of parameters nor their grouping is part of the format.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from snugpt.errors import FailedError
from snugpt.estimate.sharding import Piece
from snugpt.model.parameter_wise import ParameterWise

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
WITHOUT_MEMORY = torch.device("meta")
STORED_OTHERWISE = "the optimizer here keeps its state in another dtype"
HEADER_MULTIPLE_BYTES = 8  # the format's alignment: padded headers let readers map the tensors


@dataclass(frozen=True, slots=True)
class Owner:
    """The optimizer that updates one parameter."""

    optimizer: ParameterWise
    parameter: nn.Parameter
    piece: Piece | None = None  # the rows of its weight that are updated here, where not all are

    def whole_shape(self, tensor: Tensor) -> torch.Size:
        """The shape of what the parameter's `tensor` is a part of; scalars are whole."""
        if self.piece is None or not tensor.dim():
            return tensor.shape
        return torch.Size((self.piece.rows, *tensor.shape[1:]))


def tensor_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: the header, then each tensor.

    safetensors' own writer copies all tensors to host memory first; this holds one at a time.
    """
    # Wide elements first, so that every tensor starts at a multiple of its element size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % HEADER_MULTIPLE_BYTES)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().data


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by name; a tied one under its first name."""
    return dict(model.named_parameters())


def optimizer_tensors(model: nn.Module, optimizers: Sequence[ParameterWise]) -> dict[str, Tensor]:
    """The optimizers' state by "<optimizer>/<parameter name>/<key>"; empty before the first step.

    Rates and other hyperparameters are left out: they belong to the recipe's schedule.
    """
    return {
        f"{prefix}/{key}": value
        for prefix, owner in _owners(model, optimizers).items()
        for key, value in owner.optimizer.state.get(owner.parameter, {}).items()
    }


class TensorFile:
    """An open safetensors file and the name of the checkpoint it belongs to."""

    def __init__(self, file: Any, origin: Path) -> None:
        self.file, self.origin = file, origin
        self.names: frozenset[str] = frozenset(file.keys())

    def check_weights(self, model: nn.Module, *, cast: bool) -> None:
        """Raise FailedError unless the file holds exactly the model's weights.

        Shapes must agree; dtypes too, unless `cast`.
        """
        weights = weights_of(model)
        self._refuse(sorted(self.names - weights.keys()), "holds {}, which the model lacks")
        self._refuse(sorted(weights.keys() - self.names), "lacks {}, which the model has")
        for name, weight in weights.items():
            self._check_shape(name, [weight.shape])
            if not cast and self._dtype(name) != DTYPE_NAMES[weight.dtype]:
                there = self._dtype(name)
                raise self._mismatch(f"holds {name} as {there}, the model has {weight.dtype}")

    @torch.no_grad()
    def copy_weights(self, model: nn.Module) -> None:
        """Overwrite the model's weights in place."""
        for name, weight in weights_of(model).items():
            here, piece = model.ranks.stored(name, weight)
            self._copy(here, name, piece)

    def _copy(self, here: Tensor, name: str, piece: Piece | None) -> None:
        """Overwrite a tensor with the one of that name, or with a piece of it."""
        if piece is None or not here.dim():
            here.copy_(self.file.get_tensor(name))
        elif here.numel():
            here.copy_(self.file.get_slice(name)[piece.begin : piece.end])

    def check_optimizers(self, model: nn.Module, optimizers: Sequence[ParameterWise]) -> None:
        """Raise FailedError unless the file holds what the optimizers keep of each parameter.

        Of a parameter that was never updated it holds nothing.
        """
        owners = _owners(model, optimizers)
        elsewhere = weights_of(model).keys() - model.ranks.parameters(model).keys()
        stored = {name.rpartition("/")[0] for name in self.names}
        for prefix in sorted(stored):
            owner = owners.get(prefix)
            if prefix.partition("/")[2] in elsewhere:  # another rank's
                continue
            if owner is None:
                first = min(name for name in self.names if name.rpartition("/")[0] == prefix)
                raise self._mismatch(f"holds {first}, for which no optimizer here has a place")
            self._check_state(prefix, owner)

    def _check_state(self, prefix: str, owner: Owner) -> None:
        here = owner.optimizer.empty_state(owner.parameter, WITHOUT_MEMORY)
        there = {name.rpartition("/")[2] for name in self.names if name.startswith(f"{prefix}/")}
        for key in sorted(there ^ here.keys()):
            holds = f"holds {prefix}/{key}, which" if key in there else f"lacks {prefix}/{key}:"
            raise self._mismatch(f"{holds} {STORED_OTHERWISE}")
        for key, tensor in here.items():
            name, dtype = f"{prefix}/{key}", DTYPE_NAMES[tensor.dtype]
            self._check_shape(name, [owner.whole_shape(tensor)])
            if self._dtype(name) != dtype:
                raise self._mismatch(f"holds {name} as {self._dtype(name)}, here it is {dtype}")

    @torch.no_grad()
    def copy_optimizers(self, model: nn.Module, optimizers: Sequence[ParameterWise]) -> None:
        """Overwrite the optimizers' state in place; what no step has made yet is made here."""
        owners = _owners(model, optimizers)
        stored = {name.rpartition("/")[0] for name in self.names}
        for prefix in owners.keys() - stored:
            owners[prefix].optimizer.state.pop(owners[prefix].parameter, None)
        for prefix in sorted(stored & owners.keys()):
            owner = owners[prefix]
            for key, tensor in owner.optimizer.state_of(owner.parameter).items():
                self._copy(tensor, f"{prefix}/{key}", owner.piece)

    def _dtype(self, name: str) -> str:
        dtype: str = self.file.get_slice(name).get_dtype()
        return dtype

    def _check_shape(self, name: str, allowed: Sequence[torch.Size]) -> None:
        there = tuple(self.file.get_slice(name).get_shape())
        if there not in allowed:
            here = tuple(allowed[0])
            raise self._mismatch(f"holds {name} of shape {there}, the model's is {here}")

    def _refuse(self, names: Sequence[str], complaint: str) -> None:
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise self._mismatch(complaint.format(names[0] + more))

    def _mismatch(self, complaint: str) -> FailedError:
        return FailedError(
            f"checkpoint {self.origin} {complaint}",
            hint=shlex.join(["cat", str(self.origin / "state.json")]),
        )


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a verified file; anything the format or the disk refuses is a one-line FailedError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield TensorFile(file, path.parent)
    except (OSError, SafetensorError) as error:
        raise FailedError(
            f"could not read {path}: {error}", hint=shlex.join(["ls", "-l", str(path.parent)])
        ) from error


def _owners(model: nn.Module, optimizers: Iterable[ParameterWise]) -> dict[str, Owner]:
    """Who updates each parameter, by "<optimizer>/<parameter name>"."""
    name_of = {parameter: name for name, parameter in model.ranks.parameters(model).items()}
    owners = {}
    for optimizer in optimizers:
        label = type(optimizer).__name__.lower()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = name_of[parameter]
                owners[f"{label}/{name}"] = Owner(optimizer, parameter, model.ranks.own_piece(name))
    return owners

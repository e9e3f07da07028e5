"""The optimizer's update: what is kept of each parameter, and what its update takes meanwhile.

Read beside `model/adamw.py`, `model/muon.py` and `model/stored_state.py`. No update takes more than
its own parameter needs: a stretch of some elements is brought to fp32, updated and stored again,
then the next; only Muon's iteration works on a whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from snugpt.estimate import scratch
from snugpt.estimate.loss_scale import shares
from snugpt.estimate.operations import BOOL, FP32, INT32, Buffer, Net, Weight
from snugpt.estimate.parameters import edge_weights, group_of, layer_kinds, layer_weights
from snugpt.estimate.timeline import Event
from snugpt.estimate.walk import sequence
from snugpt.spec.recipe import (
    BYTES,
    ComputeDtype,
    Optimizer,
    StateDtype,
    TrainingRecipe,
    WeightDtype,
)
from snugpt.spec.runtime import FIRST_BF16, Runtime
from snugpt.spec.shape import ModelShape

BLOCK_ELEMENTS = 256  # that share one scale in int8, torchao's default
SMALLEST_INT8_ELEMENTS = 4096  # below, a parameter's moments stay fp32, as in torchao
STRETCH_ELEMENTS = 1 << 21  # that an update brings to fp32 at once: 8 MiB for each tensor of them
TABLE_VALUES = 256  # of int8: the values, and the midpoints between them
NEWTON_SCHULZ_STEPS = 5
# Bytes that an update's kernels read and write for each element, and how many it starts for each
# stretch, counted call by call (tests/estimate/test_updating.py counts them again). Stretches are
# small enough for most caches, so that the bytes are what memory may have to move at most.
FUSED_BYTES, FUSED_KERNELS = 28, 2  # AdamW reads and writes weight and moments, reads the gradient
ADAMW_BYTES, ADAMW_KERNELS = 92, 15
MUON_BYTES, MUON_KERNELS = 44, 4  # without the iteration
MOMENT_BYTES: dict[StateDtype, int] = {"fp32": 0, "bf16": 14, "int8": 47}  # to read and store it
MOMENT_KERNELS: dict[StateDtype, int] = {"fp32": 0, "bf16": 2, "int8": 8}
BF16_WEIGHT_BYTES, BF16_WEIGHT_KERNELS = 65, 9
NEWTON_SCHULZ_KERNELS = 20  # of one matrix


class Updating(NamedTuple):
    """The fields of a recipe that say how parameters are updated."""

    optimizer: Optimizer
    state_dtype: StateDtype
    weight_dtype: WeightDtype = "master"
    on_host: bool = False  # the lever `offload = optimizer`

    @classmethod
    def of(cls, recipe: TrainingRecipe) -> Updating:
        """Those of a recipe."""
        on_host = recipe.offload == "optimizer"
        return cls(recipe.optimizer, recipe.state_dtype, recipe.weight_dtype, on_host)

    def by_muon(self, name: str) -> bool:
        """Whether Muon takes a parameter, by its own name in the model."""
        return self.optimizer == "muon" and group_of(name) == "matrices"


def muon_dtype(runtime: Runtime, *, cut: bool = False) -> ComputeDtype:
    """The dtype of Muon's iteration: two bytes on CUDA, fp16 where the card has no bf16.

    A matrix that is cut over ranks is put together in bf16, which needs no scale.
    """
    if runtime.device != "cuda":
        return "fp32"
    old = runtime.capability is not None and runtime.capability < FIRST_BF16
    return "fp16" if old and not cut else "bf16"


def stored_as(state_dtype: StateDtype, elements: int) -> StateDtype:
    """The dtype of a parameter's moments: int8 only in whole blocks and where it is worth it."""
    whole = elements % BLOCK_ELEMENTS == 0 and elements >= SMALLEST_INT8_ELEMENTS
    return "fp32" if state_dtype == "int8" and not whole else state_dtype


def stretches(elements: int, *, whole: bool = False) -> Iterator[slice]:
    """The stretches of a flattened parameter that are updated one after the other."""
    each = max(1, elements) if whole else STRETCH_ELEMENTS
    return (slice(i, min(i + each, elements)) for i in range(0, elements, each))


def row_stretches(rows: int, columns: int, *, whole: bool = False) -> Iterator[slice]:
    """The same by whole rows of a matrix."""
    each = max(1, rows) if whole else max(1, STRETCH_ELEMENTS // columns)
    return (slice(i, min(i + each, rows)) for i in range(0, rows, each))


def optimizer_state(net: Net, weight: Weight, updating: Updating) -> list[Buffer]:
    """Muon: one momentum per matrix. AdamW: two moments and a 4-byte counter."""
    stored = stored_as(updating.state_dtype, weight.elements)
    if updating.by_muon(weight.name):
        return _moment(net, weight, stored, "Muon momentum", "Muon scales", "matrices")
    moment = _moment(net, weight, stored, "AdamW moments", "AdamW scales", "parameters")
    counter = net.fixed("AdamW counters", "optimizer", FP32, "4 per parameter tensor")
    return [*moment, *moment, counter]


def moment_bytes(weight: Weight, updating: Updating, elements: int) -> list[int]:
    """The bytes of each tensor of the moments of some elements of a parameter, in their order."""
    stored = stored_as(updating.state_dtype, weight.elements)
    if stored == "int8":
        each = [elements, elements // BLOCK_ELEMENTS * FP32]
    else:
        each = [elements * BYTES[stored]]
    return each if updating.by_muon(weight.name) else 2 * each


def _moment(
    net: Net, weight: Weight, stored: StateDtype, name: str, scales: str, of: str
) -> list[Buffer]:
    if stored == "int8":
        blocks = weight.elements // BLOCK_ELEMENTS
        return [
            net.fixed(name, "optimizer", weight.elements, f"{of}·1"),
            net.fixed(scales, "optimizer", blocks * FP32, f"{of}/{BLOCK_ELEMENTS}·4"),
        ]
    size = BYTES[stored]
    return [net.fixed(name, "optimizer", weight.elements * size, f"{of}·{size}")]


def int8_tables(net: Net, weights: Iterable[Weight], updating: Updating) -> list[Buffer]:
    """The values of int8 and their midpoints: with a sign where any moment is int8, and without
    where AdamW has one."""
    if updating.state_dtype != "int8":
        return []
    stored = [w for w in weights if stored_as(updating.state_dtype, w.elements) == "int8"]
    signed, unsigned = bool(stored), any(not updating.by_muon(w.name) for w in stored)
    sizes = TABLE_VALUES * FP32, (TABLE_VALUES - 1) * FP32
    return [
        net.fixed("int8 tables", "weights", size, "256·4 and 255·4 each")
        for _ in range(signed + unsigned)
        for size in sizes
    ]


def update(net: Net, weight: Weight, updating: Updating, *, abridged: bool = False) -> list[Event]:
    """What the update of one parameter takes and gives back, in order.

    Where `abridged` one stretch stands for all of its size, and two iterations for five.
    """
    stored = stored_as(updating.state_dtype, weight.elements)
    if updating.by_muon(weight.name):
        blended = _blend(net, weight, stored, abridged)
        return [*blended, *_newton_schulz(net, weight, abridged)]
    return [] if _in_place(net, stored) else _adamw(net, weight, stored, abridged)


def _told(found: Iterable[slice], abridged: bool) -> Iterable[int]:
    """The length of each stretch; where `abridged` each length once."""
    lengths = (stretch.stop - stretch.start for stretch in found)
    return dict.fromkeys(lengths) if abridged else lengths


def _in_place(net: Net, stored: StateDtype) -> bool:
    """Whether weight and moments are fp32: nothing is converted."""
    return stored == "fp32" and net.weight_bytes == FP32


class Cost(NamedTuple):
    """What one optimizer step asks of a device beside Muon's arithmetic."""

    bytes: int
    kernels: int


@lru_cache(maxsize=4096)
def update_cost(shape: ModelShape, updating: Updating) -> Cost:
    """Bytes read and written, and kernels started, by the updates of all parameters."""
    total = _cost_of(edge_weights(shape), updating, 1)
    for layer, repeats in layer_kinds(shape).items():
        more = _cost_of(layer_weights(shape, layer), updating, repeats)
        total = Cost(total.bytes + more.bytes, total.kernels + more.kernels)
    return total


def _cost_of(weights: dict[str, Weight], updating: Updating, repeats: int) -> Cost:
    num_bytes = kernels = 0
    for weight in weights.values():
        stored, low = stored_as(updating.state_dtype, weight.elements), updating.weight_dtype
        muon = updating.by_muon(weight.name)
        each, started = (MUON_BYTES, MUON_KERNELS) if muon else (ADAMW_BYTES, ADAMW_KERNELS)
        moments, times = (1 if muon else 2), -(-weight.elements // STRETCH_ELEMENTS)
        if stored == "fp32" and low == "master":
            times = 1
            each, started = (each, started) if muon else (FUSED_BYTES, FUSED_KERNELS)
        each += moments * MOMENT_BYTES[stored] + (BF16_WEIGHT_BYTES if low == "bf16" else 0)
        started += moments * MOMENT_KERNELS[stored]
        started += BF16_WEIGHT_KERNELS if low == "bf16" else 0
        num_bytes += repeats * each * weight.elements
        kernels += repeats * (times * started + (NEWTON_SCHULZ_KERNELS if muon else 0))
    return Cost(num_bytes, kernels)


class _Stretch:
    """The tensors of one stretch: `made` names an fp32 one, `reads` and `writes` what stored ones
    take on the way."""

    def __init__(self, net: Net, elements: int, stored: StateDtype) -> None:
        self.net, self.elements, self.stored = net, elements, stored

    def made(self, size: int = FP32) -> Buffer:
        formula = f"stretch·{size}"
        return self.net.fixed("update scratch", "optimizer", self.elements * size, formula)

    def by_chance(self) -> tuple[Buffer, ...]:
        noise, is_nan = self.made(INT32), self.made(BOOL)
        return noise, is_nan, is_nan, noise

    def read(self) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...]]:
        """What is made to read a moment, and the moment itself; fp32 is read where it lies."""
        if self.stored == "fp32":
            return (), ()
        moment = (self.made(),)
        if self.stored == "bf16":
            return moment, moment
        codes = self.made(INT32)
        return (codes, *moment, codes), moment

    def written(self) -> tuple[Buffer, ...]:
        if self.stored != "int8":
            return ()
        codes = self.made(INT32)
        return *self.fresh_scales(), codes, codes

    def fresh_scales(self) -> tuple[Buffer, ...]:
        """Those of int8, put beside the old ones where the step may not be taken."""
        if self.net.compute_dtype != "fp16":
            return ()
        blocks = self.elements // BLOCK_ELEMENTS
        scales = self.net.fixed("update scratch", "optimizer", blocks * FP32, "stretch/256·4")
        return scales, scales

    def weight(self) -> tuple[Buffer, ...]:
        """A copy in fp32 of weights or gradients that are bf16."""
        return (self.made(),) if self.net.weight_bytes < FP32 else ()


def _adamw(net: Net, weight: Weight, stored: StateDtype, abridged: bool) -> list[Event]:
    """`AdamW._by_stretches`."""
    corrections = [net.fixed("update scratch", "optimizer", FP32, "4") for _ in range(2)]
    buffers: list[Buffer] = [*corrections]
    for length in _told(stretches(weight.elements), abridged):
        of = _Stretch(net, length, stored)
        grad, value, denominator = of.weight(), of.weight(), of.made()
        (first_read, first), (second_read, second) = of.read(), of.read()
        buffers += [
            *grad, *first_read, *second_read, *grad, denominator, *value, *shares(net),
            denominator,
            *(of.by_chance() if value else ()), *value,
            *of.written(), *first, *of.written(), *second,
        ]  # fmt: skip
    return sequence([*buffers, *corrections])


def _blend(net: Net, weight: Weight, stored: StateDtype, abridged: bool) -> list[Event]:
    """`Muon._blend`."""
    buffers: list[Buffer] = []
    found = stretches(weight.elements, whole=_in_place(net, stored))
    for length in _told(found, abridged):
        of = _Stretch(net, length, stored)
        grad, (read, momentum) = of.weight(), of.read()
        buffers += [*grad, *read, *grad, *of.written(), *momentum]
    return sequence(buffers)


def _newton_schulz(net: Net, weight: Weight, abridged: bool) -> list[Event]:
    """`muon.orthogonalised`: the matrix twice and two squares of its smaller side. Then the update
    is brought to the weight, which takes nothing unless that is bf16."""
    rows, columns = weight.rows, weight.columns
    dtype = muon_dtype(net.runtime)
    width = BYTES[dtype]
    small = min(rows, columns)

    def made(elements: int, text: str) -> Buffer:
        return net.fixed("Muon scratch", "optimizer", elements * width, f"{text}·{width}")

    cast, x = (made(rows * columns, "rows·columns") for _ in range(2))
    first = (cast,) if dtype != ("fp32" if net.weight_bytes == FP32 else "bf16") else ()
    turned = not net.cuda and rows > columns
    sizes = scratch.cpu_transposed_copy(rows, columns, width) if turned else ()
    copied = tuple(net.fixed("copy scratch", "workspace", n, "60·60") for n in sizes)
    buffers: list[Buffer] = [*first, x, *first]
    for _ in range(2 if abridged else NEWTON_SCHULZ_STEPS):
        gram, polynomial = made(small * small, "m·m"), made(small * small, "m·m")
        following = made(rows * columns, "rows·columns")
        buffers += [gram, polynomial, gram, following, *copied, *copied, x, polynomial]
        x = following
    if net.weight_bytes < FP32:
        for length in _told(row_stretches(rows, columns), abridged):
            of = _Stretch(net, length * columns, "fp32")
            value = of.made()
            buffers += [value, *of.by_chance(), value]
    return sequence([*buffers, x])

"""What an operation is to the estimate: buffers that are allocated, kept and freed.

A *sequence of events* is a tuple of buffers: a buffer is allocated where it is first named and
freed where it is named again. `forward` names the result, what is kept beside it, and scratch;
`backward` names the gradients and scratch. The incoming gradient and what was kept are freed by the
walk; what was kept and is named in `backward` is freed there.
"""

from __future__ import annotations

from dataclasses import dataclass

from snugpt.spec.memory import Category
from snugpt.spec.recipe import BYTES, ComputeDtype, WeightDtype
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape

FP32, INT32, INT64, BOOL = 4, 4, 8, 1  # bytes


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """One tensor: `fixed_bytes + batch * sequence_bytes`, before the backend rounds it up."""

    name: str
    category: Category
    fixed_bytes: int
    sequence_bytes: int
    formula: str


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A parameter as an operation sees it: its elements and the name it has in the model."""

    name: str
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """rows x columns."""
        return self.rows * self.columns


Gradient = tuple[Buffer, Buffer | None]  # for whom, and which; None hands on what came in
WeightGradient = tuple[Weight, Buffer]


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One call: see the module docstring for `forward` and `backward`.

    Where `gives_views`, its gradients are views of other tensors, into which autograd never adds.
    """

    name: str
    reads: tuple[Buffer, ...]
    result: Buffer
    forward: tuple[Buffer, ...]
    keeps: tuple[Buffer, ...] = ()
    backward: tuple[Buffer, ...] = ()
    gradients: tuple[Gradient, ...] = ()
    weight_gradients: tuple[WeightGradient, ...] = ()
    gives_views: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Operations that run again in the backward pass; their `results` are not kept meanwhile."""

    operations: tuple[Operation, ...]
    results: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class Net:
    """What the sizes of all operations depend on, and how to write one down."""

    shape: ModelShape
    runtime: Runtime
    compute_dtype: ComputeDtype
    seq_len: int
    casts_weights: bool = True  # training has its own dtype; generation stores them as it computes
    drops: bool = True  # dropout works in training steps only
    weight_dtype: WeightDtype = "master"  # of training
    fp8: bool = False  # linear maps multiply in FP8, in training steps only

    @property
    def width_bytes(self) -> int:
        """Bytes of one element in the compute dtype."""
        return BYTES[self.compute_dtype]

    @property
    def weight_bytes(self) -> int:
        """Bytes of one element of a weight and of its gradient."""
        if not self.casts_weights:
            return self.width_bytes
        return BYTES["bf16"] if self.weight_dtype == "bf16" else FP32

    @property
    def casts(self) -> bool:
        """Whether weights are cast to the compute dtype at each use."""
        return self.weight_bytes != self.width_bytes

    @property
    def lowers(self) -> bool:
        """Whether the compute dtype is below fp32, in which losses are worked out."""
        return self.width_bytes < FP32

    @property
    def cuda(self) -> bool:
        """Whether the CUDA kernels run, and not the CPU's."""
        return self.runtime.device == "cuda"

    @property
    def dropout(self) -> bool:
        """Whether dropout is active."""
        return self.drops and self.shape.dropout > 0

    def per_token(
        self,
        name: str,
        elements: int,
        text: str,
        *,
        element_bytes: int | None = None,
        category: Category = "activations",
    ) -> Buffer:
        """A tensor of `elements` per token, in the compute dtype unless said otherwise."""
        size = self.width_bytes if element_bytes is None else element_bytes
        formula = f"B·T·{text}·{size}" if text else f"B·T·{size}"
        return Buffer(name, category, 0, self.seq_len * elements * size, formula)

    def fixed(self, name: str, category: Category, num_bytes: int, formula: str) -> Buffer:
        """A tensor whose size does not depend on the batch."""
        return Buffer(name, category, num_bytes, 0, formula)

    def gradient_of(self, buffer: Buffer) -> Buffer:
        """The gradient of an activation: the same bytes."""
        return Buffer(
            "activation gradients", "activations", buffer.fixed_bytes, buffer.sequence_bytes,
            buffer.formula,
        )  # fmt: skip

    def weight_gradient(self, weight: Weight) -> Buffer:
        """A parameter's gradient in the dtype of the parameter."""
        size = self.weight_bytes
        formula = f"{weight.name}: {weight.rows}·{weight.columns}·{size}"
        return self.fixed("gradients", "gradients", weight.elements * size, formula)

    def cast_of(self, weight: Weight) -> tuple[Buffer, ...]:
        """A weight's copy in the compute dtype, none where it is stored in it."""
        if not self.casts:
            return ()
        size = weight.elements * self.width_bytes
        return (
            self.fixed("weight casts", "activations", size, f"largest weight·{self.width_bytes}"),
        )

"""Any model: its training step or forward pass on a named card, with neither card nor memory.

    trace = snugpt.trace(model, {"input_ids": tokens, "labels": tokens}, gpu="rtx-4090")
    trace.allocated_bytes, trace.peak_phase, trace.largest_batch()

The model is copied to the meta device without its data and runs there as on CUDA: its attention
kernels, its dtypes under autocast, its fused optimizer. What is asked of the machine (a value, a
file of CUDA) is refused with the line.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.utils._pytree import tree_leaves

from snugpt.errors import BadQuestionError, bad_value
from snugpt.estimate import scratch
from snugpt.estimate.timeline import Timeline
from snugpt.planner.machine import Machine, machine_for
from snugpt.spec.runtime import FIRST_BF16, Runtime, runtime_for
from snugpt.tracing.autocast import Casts, honoured
from snugpt.tracing.kernels import kernels_of
from snugpt.tracing.model_allocations import ModelAllocations
from snugpt.tracing.placing import (
    META,
    OnDevice,
    batch_maker,
    building,
    called,
    described,
    loose_tensors,
    loss_of,
    model_on_meta,
    no_loss,
    uncompiled,
)
from snugpt.tracing.refusals import Remedy, users_code
from snugpt.tracing.trace_result import Recorded, Trace
from snugpt.tracing.ways import Ways, ways_of

Autocast = Literal["auto", "bf16", "fp16"]
MakeOptimizer = Callable[[list[nn.Parameter]], Any]
LossOf = Callable[[Any, Any], Tensor]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TRAINING_THREADS = 2  # autograd's thread multiplies with a cuBLAS handle of its own


def trace(
    model: nn.Module | Callable[[], nn.Module],
    batch: Any,
    *,
    gpu: str | None = None,
    batch_size: int | None = None,
    dtype: Autocast | None = "auto",
    optimizer: Literal["adamw"] | MakeOptimizer | None = "adamw",
    loss: LossOf | None = None,
    train: bool = True,
    clip_norm: float | None = 1.0,
    grad_accum_steps: int = 1,
    keep_outputs: bool = False,
    steps: int = 2,
) -> Trace:
    """Trace one step of a model and return its peak, phase, largest tensors and largest batch.

    Args:
        model: an nn.Module, which stays untouched, or a function that builds one.
        batch: what the model is called with: a mapping (by name), a tuple or list (in order) or one
            tensor; only shapes and dtypes count. Tensors are scaled along their first dimension.
            Or a function from a batch size to such a batch.
        gpu: a card of the catalogue, or "cpu"; None is this machine.
        batch_size: sequences in the batch; by default as given, 1 for a function.
        dtype: autocast around forward and loss: "bf16", "fp16", None for none; "auto" is bf16 where
            the card has it.
        optimizer: "adamw" is PyTorch's, fused on CUDA; a function takes the parameters and returns
            an optimizer; None leaves the step without one.
        loss: a function of output and batch that returns a scalar; by default the scalar loss that
            the model returns (alone, in a tuple or as `loss`).
        train: False traces a forward pass without gradients.
        clip_norm: the norm that gradients are clipped to; None leaves them.
        grad_accum_steps: micro-batches to a step.
        keep_outputs: whether the loop holds the model's outputs during backward, as
            `logits, loss = model(x, y)` does.
        steps: how many steps run; the last is kept. Optimizer state exists from the second on.

    Raises:
        BadQuestionError: an argument is out of range, or the model returned no loss.
        FailedError: the model asks for data, mixes devices or raises; the line is named.
    """
    machine = machine_for(gpu)
    for name, value in (("grad_accum_steps", grad_accum_steps), ("steps", steps)):
        if value < 1:
            raise bad_value(name, value, "1 or more", hint=f"snugpt.trace(model, batch, {name}=2)")
    with users_code("placing the model"):
        placed = _placed(model, machine)
        _, given = batch_maker(batch)
    tracer = Tracer(
        model=placed,
        batch=batch,
        machine=machine,
        dtype=dtype,
        optimizer=optimizer,
        loss=loss,
        train=train,
        clip_norm=clip_norm,
        grad_accum_steps=grad_accum_steps,
        keep_outputs=keep_outputs,
        steps=steps,
    )
    size = batch_size if batch_size is not None else given or 1
    if size < 1:
        raise bad_value("batch_size", size, "1 or more", hint="snugpt.trace(..., batch_size=8)")
    return Trace.of(tracer, size)


@dataclass(eq=False)
class Tracer:
    """A model with its loop on one machine: records its step at any batch size, once each."""

    model: nn.Module
    batch: Any
    machine: Machine
    dtype: Autocast | None
    optimizer: Literal["adamw"] | MakeOptimizer | None
    loss: LossOf | None
    train: bool
    clip_norm: float | None
    grad_accum_steps: int
    keep_outputs: bool
    steps: int
    _recorded: dict[int, Recorded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.autocast = _autocast(self.dtype, self.machine)

    @property
    def runtime(self) -> Runtime:
        """Whose kernels run."""
        compute = "bf16" if self.autocast == torch.bfloat16 else "fp32"
        return runtime_for(self.machine.gpu, compute, 0.0, torch.get_num_threads())

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(each.numel() for each in self.model.parameters())

    def on(self, gpu: str) -> Tracer:
        """The same model and loop on another card."""
        return replace(self, machine=machine_for(gpu), _recorded={})

    def record(self, batch_size: int) -> Recorded:
        """Run the step at a batch size; remembered."""
        found = self._recorded.get(batch_size)
        if found is None:
            found = self._recorded[batch_size] = self._run(batch_size)
        return found

    def _run(self, batch_size: int) -> Recorded:
        runtime = self.runtime
        with users_code("copying the model"):
            model = copy.deepcopy(self.model).train(self.train)
        with ExitStack() as stack:
            stack.enter_context(_without_collector())
            stack.enter_context(uncompiled())
            stack.enter_context(kernels_of(runtime))
            ways = stack.enter_context(ways_of(runtime))
            device = stack.enter_context(OnDevice(runtime.device == "cuda"))
            allocations = stack.enter_context(ModelAllocations(runtime))
            stack.enter_context(users_code(lambda: allocations.phase))
            timeline = self._steps(model, batch_size, allocations, ways)
        return Recorded(
            timeline,
            dict(ways.attention),
            tuple(_notes(self.machine, ways, device, allocations)),
        )

    def _steps(
        self,
        model: nn.Module,
        batch_size: int,
        allocations: ModelAllocations,
        ways: Ways,
    ) -> Timeline:
        _label_weights(allocations, model)
        weights = [each for each in model.parameters() if each.requires_grad]
        if self.train and not weights:
            raise BadQuestionError(
                "no parameter of the model requires a gradient",
                hint=Remedy("snugpt.trace(model, batch, train=False)", task="generate"),
            )
        optimizers = self._optimizers(weights) if self.train else []
        with allocations.naming(model):
            for number in range(self.steps):
                if number == self.steps - 1:
                    _label_states(allocations, optimizers)
                    self._tell_workspaces(allocations)
                    gc.collect(0)  # what the first step left in circles
                    ways.attention.clear()
                    allocations.begin("forward")
                self._step(model, weights, optimizers, allocations, batch_size)
        return allocations.timeline(self.runtime.block_bytes)  # before the model goes

    def _step(self, model, weights, optimizers, allocations, batch_size) -> None:
        """One optimizer step, or one forward pass; nothing but state outlives it."""
        if not self.train:
            with torch.no_grad():
                output = self._forward(model, self._batch(allocations, batch_size))
            del output
            return
        for _ in range(self.grad_accum_steps):
            allocations.mark("forward")
            batch = self._batch(allocations, batch_size)
            with self._casting():
                output = called(model, batch)
                loss = self._loss(model, output, batch)
            if not self.keep_outputs:
                del output
            allocations.mark("backward")
            _backward(loss)
            del loss, batch
        if self.keep_outputs:
            del output
        if self.clip_norm is not None:
            allocations.mark("clip")
            torch.nn.utils.clip_grad_norm_(weights, self.clip_norm)
        if optimizers:
            allocations.mark("optimizer")
            for each in optimizers:
                each.step()
        model.zero_grad(set_to_none=True)

    def _forward(self, model: nn.Module, batch: Any) -> Any:
        with self._casting():
            return called(model, batch)

    def _casting(self):
        if self.autocast is None:
            return nullcontext()
        return torch.autocast("cuda", self.autocast)

    def _loss(self, model: nn.Module, output: Any, batch: Any) -> Tensor:
        made = output if self.loss is None else self.loss(output, batch)
        found = loss_of(made)
        if found is None and self.loss is None:
            raise no_loss(output, model, batch)
        if found is None:
            raise bad_value(
                "loss", described(made), "the function returns a scalar with a gradient",
                hint="snugpt.trace(..., loss=lambda output, batch: output.float().mean())",
            )  # fmt: skip
        return found

    def _batch(self, allocations: ModelAllocations, size: int) -> Any:
        make, _ = batch_maker(self.batch)
        batch = make(size)
        for each in tree_leaves(batch):
            if isinstance(each, Tensor):
                allocations.label(each, "batch", "batch")
        return batch

    def _optimizers(self, weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        if self.optimizer is None:
            return []
        if self.optimizer == "adamw":
            fused = self.runtime.device == "cuda"
            return [torch.optim.AdamW(weights, fused=fused or None)]
        if not callable(self.optimizer):
            raise bad_value(
                "optimizer", self.optimizer, '"adamw", None or a function of the parameters',
                hint="snugpt.trace(..., optimizer=lambda p: torch.optim.SGD(p, 0.1))",
            )  # fmt: skip
        made = self.optimizer(weights)
        optimizers = list(made) if isinstance(made, Sequence) else [made]
        for each in optimizers:
            if not isinstance(each, torch.optim.Optimizer):
                raise bad_value(
                    "optimizer", type(each).__name__, "a function returns one optimizer or several",
                    hint="snugpt.trace(..., optimizer=lambda p: torch.optim.SGD(p, 0.1))",
                )  # fmt: skip
        return optimizers

    def _tell_workspaces(self, allocations: ModelAllocations) -> None:
        runtime = self.runtime
        if runtime.device == "cuda":
            for _ in range(TRAINING_THREADS if self.train else 1):
                size = scratch.cublas_workspace(runtime.capability)
                allocations.tell(size, "workspace", "cuBLAS workspace")


def _placed(model: nn.Module | Callable[[], nn.Module], machine: Machine) -> nn.Module:
    """The model on the meta device: copied, or built there."""
    made = model
    if callable(model) and not isinstance(model, nn.Module):
        made = built(model, machine)
    if not isinstance(made, nn.Module):
        raise bad_value(
            "model", described(made), "an nn.Module or a function that builds one",
            hint="snugpt.trace(lambda: Model(...), batch)",
        )  # fmt: skip
    return model_on_meta(made)


def built(build: Callable[[], Any], machine: Machine) -> Any:
    """Call a function that builds a model, everything it makes on the meta device."""
    with ExitStack() as stack:
        if machine.gpu.backend != "cpu":  # a context that the model keeps is made here
            stack.enter_context(honoured(Casts(), _has_bf16(machine)))
        stack.enter_context(building(machine.gpu.backend != "cpu"))
        stack.enter_context(users_code("building the model"))
        return build()


def _autocast(dtype: Autocast | None, machine: Machine) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if dtype and _has_bf16(machine) else None
    if dtype not in DTYPES:
        raise bad_value("dtype", dtype, "auto, bf16, fp16 or None", hint="dtype='bf16'")
    if machine.gpu.backend == "cpu":
        hint = Remedy("dtype=None", compute_dtype="fp32")
        raise bad_value("dtype", dtype, "None on the CPU", hint=hint)
    if dtype == "bf16" and not _has_bf16(machine):
        hint = Remedy("dtype='fp16'", compute_dtype="fp32")
        raise bad_value("dtype", dtype, f"{machine.gpu.name} has no bf16", hint=hint)
    return DTYPES[dtype]


def _has_bf16(machine: Machine) -> bool:
    return (machine.gpu.capability or (0, 0)) >= FIRST_BF16


def _backward(loss: Tensor) -> None:
    """What `loss.backward()` comes to; that itself would leave function modes behind."""
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True,
        accumulate_grad=True,
    )  # fmt: skip


@contextmanager
def _without_collector():
    """Free tensors in the order of their references, not when the collector happens to run."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _label_weights(allocations: ModelAllocations, model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        allocations.label(buffer.to(META), "weights", name)
    for name, tensor in loose_tensors(model):
        allocations.label(tensor, "weights", name)
    for name, weight in model.named_parameters():
        allocations.label(weight, "weights", name)

        def labelled(owner: Tensor, name: str = name) -> None:
            if owner.grad is not None:
                allocations.label(owner.grad, "gradients", f"gradient of {name}")

        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(labelled)


def _label_states(allocations: ModelAllocations, optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.is_meta:
                    said = f"{type(optimizer).__name__} {name}"
                    allocations.label(value, "optimizer", said)


def _notes(
    machine: Machine, ways: Ways, device: OnDevice, allocations: ModelAllocations
) -> list[str]:
    """What the reader of the figures has to know."""
    notes = [f"assumed: {said}" for said in sorted(device.assumed)]
    if allocations.uncounted:
        names = ", ".join(sorted(allocations.uncounted))
        notes.append(f"not counted: what libraries take for themselves in {names}")
    if machine.gpu.backend not in ("cuda", "cpu"):
        notes.append(f"{machine.gpu.name} is traced by CUDA's rules, which is not tested")
    if ways.casts.made_before:
        notes.append("an autocast made before the trace was taken as on")
    return notes

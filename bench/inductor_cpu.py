"""Real compiled steps on the CPU beside eager ones and beside the function's prediction.

    python bench/inductor_cpu.py

The second check of `estimate/compiled.py`, at toy size and with g++ for a compiler: the compiled
step gives the gradients of the eager one, its layers share their graphs, and its peak by torch's
own allocator is set against the prediction. This holds what the CUDA plan can't show: that
PyTorch's runtime lets go of what the plan frees. What differs on the CPU: value embeddings sum
their gradient with a kernel of their own, which holds the table's gradient twice.
"""

from __future__ import annotations

import sys
from unittest import mock

import torch

from snugpt.estimate.training import TrainingStep
from snugpt.model import compiling
from snugpt.model.build import build_for_training
from snugpt.model.gpt import GPT
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import evaluate_batch, step
from snugpt.run.cpu_allocations import CpuAllocations
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import STYLES, ModelShape, shape_for

MIB = 2**20
SCHEDULE = Schedule(
    learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.0, warmup_fraction=0.0,
    cooldown_fraction=0.5, final_fraction=0.0, clip_norm=1.0, seed=0, eval_every_steps=10,
    eval_tokens=1000, save_every_steps=10,
)  # fmt: skip
RUNTIME = Runtime(device="cpu", attention="cpu", num_threads=1)


def recipe_for(seq_len: int, batch: int, **levers: str) -> TrainingRecipe:
    tokens = seq_len * batch
    return TrainingRecipe(
        seq_len=seq_len, device_batch_size=batch, grad_accum_steps=1, total_batch_tokens=tokens,
        total_tokens=10 * tokens, compute_dtype="fp32", loss="chunked", loss_chunk_tokens=64,
        optimizer="muon", schedule=SCHEDULE, **{"checkpoint": "none", **levers},
    )  # fmt: skip


def model_for(shape: ModelShape, recipe: TrainingRecipe) -> GPT:
    """A model whose residual projections and gates are not zero, so that all gradients are made."""
    model = build_for_training(shape, recipe, RUNTIME, seed=1)
    drawn = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if name.endswith(("output", "down", "value_gate")):
            torch.nn.init.normal_(weight, std=0.02, generator=drawn)
    return model


def batch_for(shape: ModelShape, recipe: TrainingRecipe) -> tuple[torch.Tensor, torch.Tensor]:
    size = recipe.device_batch_size, recipe.seq_len
    drawn = torch.Generator().manual_seed(0)
    return tuple(torch.randint(0, shape.vocab_size, size, generator=drawn) for _ in range(2))


def gradients(shape: ModelShape, recipe: TrainingRecipe) -> tuple[float, dict[str, torch.Tensor]]:
    model, (tokens, targets) = model_for(shape, recipe), batch_for(shape, recipe)
    scale = 1 / recipe.total_batch_tokens
    loss = model.loss(model.hidden(tokens), targets, chunk=64, scale=scale)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters()}


def peaks(shape: ModelShape, recipe: TrainingRecipe) -> dict[str, int]:
    """The most bytes alive in each phase of the second step."""
    with CpuAllocations(keep_events=False) as allocations:
        model = model_for(shape, recipe)
        optimizers = optimizers_for(model, recipe)
        step(model, optimizers, recipe, lambda _: batch_for(shape, recipe))
        allocations.mark("forward")
        step(model, optimizers, recipe, lambda _: batch_for(shape, recipe), allocations.mark)
        allocations.mark("evaluate")
        evaluate_batch(model.eval(), recipe, batch_for(shape, recipe))
    return allocations.phases


def graphs_compiled(style: str, shape: ModelShape, recipe: TrainingRecipe) -> str:
    """Compare gradients with eager ones; count the graphs that all layers shared."""
    real, made = compiling.sublayer_backend, []

    def counted(graph, inputs, **options):
        made.append(graph)
        return real(graph, inputs, **options)

    eager_loss, eager = gradients(shape, recipe_for(recipe.seq_len, recipe.device_batch_size))
    with mock.patch.object(compiling, "sublayer_backend", counted):
        loss, found = gradients(shape, recipe)
    worst = max(float((found[n] - eager[n]).norm() / eager[n].norm()) for n in eager)
    return (
        f"{style}: {shape.num_layers} layers share {len(made)} graphs; loss differs by"
        f" {abs(loss - eager_loss):.1e}, gradients by {worst:.1e} at most"
    )


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; MiB by the CPU allocator; predicted : measured")
    for style in sys.argv[1:] or STYLES:
        shape = shape_for(style, 4, context_len=256, width=128, vocab_size=512)
        print(graphs_compiled(style, shape, recipe_for(256, 4, compile="on")), flush=True)
        for levers in ({}, {"checkpoint": "blocks"}):
            for compiles in ("off", "on"):
                recipe = recipe_for(256, 4, compile=compiles, **levers)
                measured = peaks(shape, recipe)
                _, predicted = TrainingStep(shape, recipe, RUNTIME).timeline().read(4)
                words = [
                    f"{phase} {predicted[phase] / MIB:.2f} : {measured[phase] / MIB:.2f}"
                    for phase in ("forward", "backward")
                ]
                print(f"  compile {compiles:3} {levers}  {'   '.join(words)}", flush=True)


if __name__ == "__main__":
    main()

"""Small models of every style with weights that leave no gradient at zero."""

from __future__ import annotations

import torch

from snugpt.model.build import build
from snugpt.model.gpt import GPT
from snugpt.model.step import Batch
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape, shape_for

VOCAB = 90  # padded to 128


def small_shape(style: str, **pinned) -> ModelShape:
    sizes = {"context_len": 256, "width": 32, "heads": 2, "kv_heads": 1, "vocab_size": VOCAB}
    return shape_for(style, pinned.pop("depth", 3), **(sizes | pinned))


def small_model(shape: ModelShape, *, dtype: str = "fp32", seed: int = 0) -> GPT:
    """All weights drawn: the product's own start has zeros that would hide half the gradients."""
    attention = "math" if shape.dropout else "cpu"
    model = build(shape, Runtime(device="cpu", attention=attention), compute_dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0.0, 0.15, generator=generator)
    return model


def random_batch(shape: ModelShape, batch: int, seq_len: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(shape.vocab_size, (batch, seq_len + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def small_recipe(
    batch: int,
    seq_len: int,
    *,
    accumulation: int = 1,
    optimizer: str = "muon",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    chunk: int = 50,
    clip_norm: float = 1.0,
    checkpoint: str = "none",
    **levers: str,
) -> TrainingRecipe:
    schedule = Schedule(
        learning_rate=learning_rate,
        matrix_learning_rate=0.02,
        weight_decay=weight_decay,
        warmup_fraction=0.0,
        cooldown_fraction=0.0,
        final_fraction=0.0,
        clip_norm=clip_norm,
        seed=0,
        eval_every_steps=1,
        eval_tokens=1,
        save_every_steps=1,
    )
    tokens = batch * seq_len * accumulation
    return TrainingRecipe(
        seq_len=seq_len,
        device_batch_size=batch,
        grad_accum_steps=accumulation,
        total_batch_tokens=tokens,
        total_tokens=tokens,
        compute_dtype="fp32",
        loss="chunked",
        loss_chunk_tokens=chunk,
        checkpoint=checkpoint,
        optimizer=optimizer,
        schedule=schedule,
        **levers,
    )

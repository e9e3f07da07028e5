"""What rounding by chance is for, and what clipping does: runs beside the plain one.

    python bench/rounding.py [--seeds 3] [--steps 200]

A small model on the built-in corpus, fp32 arithmetic, same batches and first weights for every way.
The figures are validation bits per byte at the end, over the seeds; what counts is the difference
from the plain run with the same seed. Weights are rounded by chance and moments to nearest; rows
that say otherwise are no option, they show why. Every lever has its line in `lever_exactness.py`.
The largest norm of the gradients says whether clipping to 1 ever did anything.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from msgspec.structs import replace

from snugpt.data.loader import TrainingLoader, ValidationLoader
from snugpt.data.prepare import PreparedData, prepare
from snugpt.model.build import build_for_training
from snugpt.model.optimizers import optimizers_for
from snugpt.model.step import step
from snugpt.model.stochastic_rounding import round_by_chance_
from snugpt.model.stored_state import Bf16
from snugpt.run.evaluate import bits_per_byte
from snugpt.run.learning_rate import rate_factor, set_rates
from snugpt.spec.recipe import Schedule, TrainingRecipe
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import shape_for

LAYERS, WIDTH, HEADS, VOCAB, T, B = 2, 64, 2, 1024, 128, 8
SHAPE = shape_for("nanochat", LAYERS, context_len=T, width=WIDTH, heads=HEADS, vocab_size=VOCAB)
EVALUATED_ROWS = 128
ROUNDING = "snugpt.model.parameter_wise.round_by_chance_"
WAYS: tuple[tuple[str, dict[str, str], float, str | None], ...] = (
    ("plain: fp32, clipped to 1", {}, 1.0, None),
    ("not clipped", {}, 0.0, None),
    ("state bf16", {"state_dtype": "bf16"}, 1.0, None),
    ("state bf16, by chance", {"state_dtype": "bf16"}, 1.0, "moments"),
    ("weights bf16", {"weight_dtype": "bf16"}, 1.0, None),
    ("weights bf16, nearest", {"weight_dtype": "bf16"}, 1.0, "weights"),
    ("AdamW alone", {"optimizer": "adamw"}, 1.0, None),
    ("AdamW alone, state bf16", {"optimizer": "adamw", "state_dtype": "bf16"}, 1.0, None),
    ("AdamW alone, state bf16, by chance", {"optimizer": "adamw", "state_dtype": "bf16"}, 1.0,
     "moments"),
)  # fmt: skip


def recipe_of(levers: dict[str, str], clip_norm: float, steps: int, seed: int) -> TrainingRecipe:
    schedule = Schedule(
        learning_rate=2e-3, matrix_learning_rate=0.02, weight_decay=0.0, warmup_fraction=0.0,
        cooldown_fraction=0.5, final_fraction=0.0, clip_norm=clip_norm, seed=seed,
        eval_every_steps=steps, eval_tokens=T, save_every_steps=steps,
    )  # fmt: skip
    plain = TrainingRecipe(
        seq_len=T, device_batch_size=B, grad_accum_steps=1, total_batch_tokens=B * T,
        total_tokens=steps * B * T, compute_dtype="fp32", loss="chunked", loss_chunk_tokens=512,
        checkpoint="none", optimizer="muon", schedule=schedule,
    )  # fmt: skip
    return replace(plain, **levers)


def trained(data: PreparedData, recipe: TrainingRecipe) -> tuple[float, float]:
    """Bits per byte of the validation text after all steps; the largest norm that was clipped."""
    seed = recipe.schedule.seed
    torch.manual_seed(seed)
    model = build_for_training(SHAPE, recipe, Runtime(device="cpu", attention="cpu"), seed=seed)
    optimizers = optimizers_for(model, recipe)
    loader = TrainingLoader(
        tokens=data.train.tokens, seq_len=T, seed=seed, device_batch_size=B, device="cpu"
    )
    validation = ValidationLoader(
        tokens=data.validation.tokens, seq_len=T, device_batch_size=B, max_rows=EVALUATED_ROWS
    )
    largest, plain_clip = 0.0, torch.nn.utils.clip_grad_norm_

    def clip(parameters, max_norm):
        nonlocal largest
        norm = plain_clip(parameters, max_norm)
        largest = max(largest, norm.item())
        return norm

    for number in range(recipe.num_steps):
        set_rates(optimizers, rate_factor(recipe.schedule, number, recipe.num_steps))
        with patch("torch.nn.utils.clip_grad_norm_", clip):
            step(model, optimizers, recipe, lambda micro, at=number: loader.batch(at, micro))
    found = bits_per_byte(model, recipe, validation, data.tokenizer.token_bytes)
    assert found is not None
    return found, largest


def otherwise(what: str | None):
    """Round the weights to nearest, or the moments by chance."""
    if what == "weights":
        return patch(ROUNDING, lambda x, chance: x)  # the copy that follows rounds to nearest
    source, write = torch.Generator().manual_seed(0), Bf16.write

    def by_chance(self, state, name, stretch, value, taken=None) -> None:
        write(self, state, name, stretch, round_by_chance_(value, source), taken)

    return nullcontext() if what is None else patch.object(Bf16, "write", by_chance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", default="", help="ways whose name contains this, and the plain")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = prepare("builtin", vocab_size=VOCAB, seq_len=T, cache_dir=Path(folder))
        print(
            f"{LAYERS} layers x {WIDTH}, vocabulary {VOCAB}, {asked.steps} steps of {B * T} tokens"
        )
        print(f"{'':<34}{'bits/byte':>10}{'less plain':>12}{'norm':>9}   per seed")
        plain: dict[str, list[float]] = {}
        for name, levers, clip_norm, rounded in WAYS:
            optimizer = levers.get("optimizer", "muon")
            if asked.only not in name and optimizer in plain:
                continue
            with otherwise(rounded):
                both = [
                    trained(data, recipe_of(levers, clip_norm, asked.steps, seed))
                    for seed in range(1, asked.seeds + 1)
                ]
            found, largest = [bits for bits, _ in both], max(norm for _, norm in both)
            base = plain.setdefault(optimizer, found)
            more = [one - other for one, other in zip(found, base, strict=True)]
            each = "  ".join(f"{difference:+.4f}" for difference in more)
            mean, change = statistics.mean(found), statistics.mean(more)
            print(f"{name:<34}{mean:>10.4f}{change:>+12.4f}{largest:>9.2f}   {each}", flush=True)


if __name__ == "__main__":
    main()

"""Rates, decay and intervals where nothing is pinned; every number of the schedule is here."""

from __future__ import annotations

from snugpt.planner.command import refused
from snugpt.spec.question import Question
from snugpt.spec.recipe import Optimizer, Schedule
from snugpt.spec.shape import ModelShape

MUON_LEARNING_RATE = 0.02  # for the matrices (nanochat)
# For what AdamW trains, at width 768; falls with the square root of the width (nanochat, gpt.py).
# Beside Muon it is nanochat's rate for the head at 2^19 tokens a step, and falls with the batch as
# far as 2e-3 at width 192 and 2048 tokens, the better of two tried (dev/LOG.md, 2026-11-20).
LEARNING_RATE: dict[Optimizer, float] = {"muon": 8e-3, "adamw": 1e-3}
REFERENCE_WIDTH = 768
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT: dict[Optimizer, float] = {"muon": 0.375, "adamw": 0.0}
WEIGHT_DECAY = 0.1
WARMUP_FRACTION = 0.02
COOLDOWN_FRACTION = 0.5
FINAL_FRACTION = 0.05
CLIP_NORM = 1.0
SEED = 1337
EVALUATIONS = 10  # per run
MOST_EVAL_TOKENS = 2**19
# An evaluation costs a third of training on its tokens: ten of this share make 5 % of the run.
EVAL_SHARE = 64


def schedule_for(
    question: Question,
    shape: ModelShape,
    optimizer: Optimizer,
    *,
    num_steps: int,
    total_tokens: int,
    seq_len: int,
) -> Schedule:
    """Return the schedule of a run of `num_steps` steps, pinned fields as they are.

    Raises:
        BadQuestionError: warm-up and cool-down together are longer than the run.
    """
    warmup = _or(question.warmup_fraction, WARMUP_FRACTION)
    cooldown = _or(question.cooldown_fraction, COOLDOWN_FRACTION)
    if warmup + cooldown > 1.0:
        raise refused(
            f"warmup_fraction = {warmup} is not allowed: at most {1 - cooldown:g} beside the"
            " cool-down",
            question, warmup_fraction=None, cooldown_fraction=None,
        )  # fmt: skip
    batch_share = min(1.0, total_tokens / num_steps / REFERENCE_BATCH_TOKENS)
    rate = LEARNING_RATE[optimizer] * (REFERENCE_WIDTH / shape.model_dim) ** 0.5
    rate *= batch_share ** BATCH_EXPONENT[optimizer]
    every = max(1, num_steps // EVALUATIONS)
    eval_tokens = min(MOST_EVAL_TOKENS, total_tokens // EVAL_SHARE)
    return Schedule(
        learning_rate=_or(question.learning_rate, rate),
        matrix_learning_rate=_or(question.matrix_learning_rate, MUON_LEARNING_RATE),
        weight_decay=_or(question.weight_decay, WEIGHT_DECAY),
        warmup_fraction=warmup,
        cooldown_fraction=cooldown,
        final_fraction=FINAL_FRACTION,
        clip_norm=_or(question.clip_norm, CLIP_NORM),
        seed=SEED if question.seed is None else question.seed,
        eval_every_steps=question.eval_every or every,
        eval_tokens=max(seq_len, eval_tokens // seq_len * seq_len),
        save_every_steps=question.save_every or every,
    )


def _or(pinned: float | None, default: float) -> float:
    return default if pinned is None else pinned

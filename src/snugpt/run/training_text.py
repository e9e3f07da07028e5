"""The text of a run: tokenized once, with the tokenizer that stays the run's own."""

from __future__ import annotations

from pathlib import Path

from snugpt.data.prepare import PreparedData, prepare
from snugpt.data.tokenizer import Tokenizer
from snugpt.errors import FailedError
from snugpt.run.reports import Notice, Watcher
from snugpt.run.run_folder import RunFolder
from snugpt.spec.plan import Plan
from snugpt.spec.recipe import TrainingRecipe


def prepare_data(
    plan: Plan, folder: RunFolder, recipe: TrainingRecipe, cache_dir: Path, watcher: Watcher
) -> PreparedData:
    """Tokenize the plan's text, with the tokenizer of the run if it has one already."""
    known = folder.tokenizer_file.exists()
    data = prepare(
        plan.question.input or "builtin",
        vocab_size="byte" if plan.question.byte_tokens else plan.shape.vocab_size,
        seq_len=recipe.seq_len,
        cache_dir=cache_dir,
        tokenizer=Tokenizer.load(folder.tokenizer_file) if known else None,
        progress=lambda stage, share: watcher(Notice(text=f"{stage} {share:.0%}")),
    )
    if data.tokenizer.vocab_size > plan.shape.vocab_size:
        raise FailedError(
            f"the tokenizer has {data.tokenizer.vocab_size} entries, the model"
            f" {plan.shape.vocab_size}",
            hint="snugpt train --name another-name",
        )
    return data

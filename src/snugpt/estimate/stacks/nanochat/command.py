"""nanochat's own command line, spelled as each version reads it.

October's configurator compares types: a float must be written as one. Its flags have underscores;
argparse came in January 2026 and with it hyphens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snugpt.estimate.stacks.nanochat.versions import Version
from snugpt.spec.recipe import TrainingRecipe

SCRIPT = "scripts.base_train"
DEFAULT_SEQ_LEN = 2048
_FLOATS = (
    "matrix_learning_rate", "weight_decay", "warmup_fraction", "cooldown_fraction", "clip_norm",
)  # fmt: skip
_AS_SAID = (
    "tokens_per_param", "window_pattern", *_FLOATS, "eval_every", "save_every",
)  # fmt: skip


def base_train_command(
    version: Version,
    depth: int,
    recipe: TrainingRecipe,
    said: Mapping[str, Any],
    *,
    automatic_batch_tokens: int,
) -> str:
    """Return the command that trains a recipe.

    `said` are the fields of the question; what nanochat would choose by itself is left out, but for
    the batch on a card. `automatic_batch_tokens` is the total it would choose.
    """
    words = _start(recipe)
    values: dict[str, Any] = {"depth": depth}
    if recipe.seq_len != DEFAULT_SEQ_LEN:
        values["seq_len"] = recipe.seq_len
    values["device_batch_size"] = recipe.device_batch_size
    if recipe.total_batch_tokens != automatic_batch_tokens:
        values["total_batch_tokens"] = recipe.total_batch_tokens
    if {"num_iterations", "hours", "total_tokens"} & said.keys():
        values["num_iterations"] = recipe.num_steps
    values |= {field: said[field] for field in _AS_SAID if field in said}
    ratio = values.get("tokens_per_param")
    if ratio is not None and ratio == int(ratio):
        values["tokens_per_param"] = int(ratio)
    values |= {field: float(values[field]) for field in _FLOATS if field in values}
    words += [f"--{version.options[field]}={_text(value)}" for field, value in values.items()]
    if recipe.fp8 == "on":
        words.append(f"--{version.options['fp8']}")
    return " ".join(words)


def _start(recipe: TrainingRecipe) -> list[str]:
    """The program; nanochat has no flag against its compiler, PyTorch has a variable."""
    switch = ["TORCHDYNAMO_DISABLE=1"] if recipe.compile == "off" else []
    if recipe.launcher == "python":
        return [*switch, "python", "-m", SCRIPT]
    return [
        *switch, "torchrun", "--standalone", f"--nproc_per_node={recipe.world_size}",
        "-m", SCRIPT, "--",
    ]  # fmt: skip


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def mend(version: Version) -> str:
    """Return the shell command that has the optimizer wait on the work and not on its future."""
    if version.optimizer == "lists":
        return (
            "sed -i -e 's/\\.get_future()//' \\\n"
            "   -e 's/t.*collect_all(\\(.*\\)).wait()/[w.wait() for w in \\1]/' \\\n"
            "   nanochat/adamw.py nanochat/muon.py"
        )
    return "sed -i 's/\\.get_future()//' nanochat/optim.py"

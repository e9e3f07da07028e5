"""Flags made from the fields of a Question: one table, whatever verb asks.

A flag is the field's name with hyphens. Types come from Question, ranges are checked by it, help
and sections stand here; other programs' names for a field are aliases of its flag.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
import msgspec

from snugpt.spec.question import (
    ALIASES,
    GENERATION_ONLY,
    TRAINING_ONLY,
    Question,
    overlay,
)

Command = TypeVar("Command", bound=Callable[..., Any])

SECTIONS: dict[str, dict[str, str]] = {
    "What for": {
        "gpu": "The card, as people write it; cpu; default: this machine.",
        "num_gpus": "Cards of that kind, up to 8.",
        "stack": "The program that will run it: snugpt, nanochat, nanochat@2025-10, ...",
        "launcher": "How nanochat is started: python or torchrun.",
        "task": "What the plan is for; default: train.",
        "reserve": "GiB of the card left to others, a desktop's display say.",
        "objective": "The fastest that fits (speed, default) or the smallest peak (memory).",
    },
    "The model": {
        "depth": "The dial: layers = depth, width = 64 x depth.",
        "preset": "A named model: tiny, 150M, 350M_1024, d12, ...",
        "model": "A trained one: its name under runs/, or a path.",
        "style": "Family of model; default: nanochat.",
        "layers": "Layers.",
        "width": "Channels.",
        "heads": "Attention heads.",
        "kv_heads": "Key and value heads.",
        "mlp": "Width of the feed-forward layers.",
        "vocab_size": "Entries of the vocabulary.",
        "byte_tokens": "One token per byte, no tokenizer.",
        "tie": "One matrix for embedding and head.",
        "dropout": "Share dropped in training.",
        "window_pattern": "S (short) and L (long) attention, tiled over the layers.",
        "seq_len": "Tokens of one sequence, the context.",
    },
    "The text and how long to train": {
        "input": "File, folder, or builtin.",
        "total_tokens": "Tokens of the whole run.",
        "tokens_per_param": "Tokens per scaling parameter; default: 12, or 20 without nanochat.",
        "num_iterations": "Optimizer steps.",
        "hours": "What the predicted speed gives in that time.",
        "total_batch_tokens": "Tokens of one optimizer step.",
        "batch_size": "Sequences of one optimizer step.",
    },
    "Levers": {
        "device_batch_size": "Sequences on the device at once.",
        "grad_accum_steps": "Passes that one optimizer step gathers.",
        "checkpoint": "Keep activations (none), or compute some or all of them again.",
        "selective_steps": "What is computed again: pointwise, qkv, up, with commas.",
        "compile": "Compile the layers (CUDA with Triton), or run them as they are.",
        "compute_dtype": "Number format of the arithmetic.",
        "loss": "Logits in chunks or all at once.",
        "loss_chunk_tokens": "Tokens of one chunk of the loss.",
        "optimizer": "Muon for the matrices, or AdamW for all.",
        "state_dtype": "Number format of the optimizer's moments.",
        "weight_dtype": "Weights: master (fp32) or bf16; to generate: fp32, bf16, fp16.",
        "fp8": "Products in FP8, where card and stack have it.",
        "sharding": "What several GPUs divide among them: nothing, optimizer, or full.",
        "offload": "What waits in host memory: nothing, optimizer, or activations.",
        "exact": "Only levers that leave the arithmetic as it is.",
    },
    "Schedule": {
        "learning_rate": "AdamW's peak rate.",
        "matrix_learning_rate": "Muon's peak rate.",
        "weight_decay": "Decay of the weights.",
        "warmup_fraction": "Share of the steps in which rates rise.",
        "cooldown_fraction": "Share of the steps in which rates fall.",
        "clip_norm": "Largest norm of the gradients; 0: any.",
        "seed": "Start of every random number.",
        "eval_every": "Steps between evaluations.",
        "save_every": "Steps between checkpoints.",
    },
    "Generation": {
        "batch": "Sequences at once; default: 1.",
        "prompt_tokens": "Tokens of the prompt; default: 512.",
        "max_new_tokens": "Tokens that follow; default: 256.",
    },
}
_OPTION_OF_TYPE: dict[type, tuple[click.ParamType[Any], str]] = {
    int: (click.INT, "N"),
    float: (click.FLOAT, "X"),
    str: (click.STRING, "TEXT"),
}


class FieldOption(click.Option):
    """A flag of a Question's field; help shows its own name and, behind the text, the aliases."""

    section = ""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The flag with its value, and what it means."""
        names = "/".join((self.opts[0], *self.secondary_opts[:1]))
        shown = names if self.is_flag else f"{names} {self.make_metavar(ctx)}"
        also = f" (also {', '.join(self.opts[1:])})" if self.opts[1:] else ""
        return shown, (self.help or "") + also


class QuestionCommand(click.Command):
    """A command whose help lists the flags of a Question by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's own options first, then one block per section."""
        records: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                records.setdefault(getattr(param, "section", "Options"), []).append(record)
        for section, rows in records.items():
            with formatter.section(section):
                formatter.write_dl(rows, col_max=34)


def question_options(leave_out: Collection[str] = ()) -> Callable[[Command], Command]:
    """Return a decorator that gives a command `--config` and a flag for every field of a Question.

    The values arrive as keyword arguments by field name, None where a flag was not given; make the
    Question with `question_from`. Fields in `leave_out` get no flag.
    """

    def decorate(command: Command) -> Command:
        found = [*_options(leave_out), _config_option()]
        command.__click_params__ = [  # type: ignore[attr-defined]
            *getattr(command, "__click_params__", []),
            *reversed(found),
        ]
        return command

    return decorate


def question_from(flags: dict[str, Any]) -> Question:
    """Return the Question of parsed flags, laid over their config file if there is one.

    Raises:
        BadQuestionError: a value is out of range, or the file won't do.
    """
    said = {name: value for name, value in flags.items() if value is not None}
    config = said.pop("config", None)
    if "reserve" in said:
        from snugpt.spec.config_file import reserve_bytes

        said["reserve"] = reserve_bytes(said["reserve"])
    if config is not None:
        from snugpt.spec.config_file import read_config

        lower = read_config(config)
        generates = said.get("task", lower.get("task", "train")) == "generate"
        foreign = TRAINING_ONLY if generates else GENERATION_ONLY
        said = overlay(said, {name: lower[name] for name in lower if name not in foreign})
    return Question(**said)


def _config_option() -> click.Option:
    option = FieldOption(
        ["--config", "--config-file", "config"],
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="TOML or JSON with any of these fields; flags go over it.",
    )
    option.section = next(iter(SECTIONS))
    return option


def _options(leave_out: Collection[str]) -> Iterator[click.Option]:
    kinds = {field.name: field.type for field in msgspec.structs.fields(Question)}
    aliases: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        aliases.setdefault(name, []).append(_flag(alias))
    for section, fields in SECTIONS.items():
        for name, says in fields.items():
            if name not in leave_out:
                option = _option(name, kinds[name], says, aliases.get(name, []))
                option.section = section
                yield option


def _option(name: str, kind: Any, says: str, aliases: list[str]) -> FieldOption:
    flag = _flag(name)
    bare = _without_none(kind)
    if bare is bool:
        return FieldOption([f"{flag}/--no-{flag[2:]}", name], default=None, help=says)
    if name == "reserve":  # GiB on the command line, bytes in a Question
        return FieldOption([flag, name], metavar="GIB", help=says)
    if get_origin(bare) is Literal:
        choice = click.Choice(get_args(bare))
        return FieldOption([flag, *aliases, name], type=choice, help=says)
    parse, metavar = _OPTION_OF_TYPE[bare]
    return FieldOption([flag, *aliases, name], type=parse, metavar=metavar, help=says)


def _without_none(kind: Any) -> Any:
    """`int` of `int | None`."""
    inner = [each for each in get_args(kind) if each is not types.NoneType]
    return inner[0] if types.NoneType in get_args(kind) else kind


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

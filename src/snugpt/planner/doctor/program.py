"""Which program wrote a log, and with what settings: its own words, turned into our question.

snugpt's runs have a plan; nanochat and nanoGPT print their settings; of any other program the
command line is what there is. Everything here is taken from a log, which anyone can have written:
it ends as typed fields or as quoted words, never as shell text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from snugpt.errors import SnugError
from snugpt.planner.doctor.commands import command_words, flags_of
from snugpt.planner.doctor.messages import STEP
from snugpt.planner.doctor.nanochat_log import (
    OVERRIDING,
    SETTING,
    is_pretraining,
    nanochat_fields,
    script_of,
)
from snugpt.planner.doctor.reading import Line
from snugpt.spec.plan import Plan
from snugpt.spec.question import ALIASES, Question
from snugpt.spec.recipe import TrainingRecipe

ProgramName = Literal["snugpt", "nanochat", "nanogpt", "other"]
_NANOGPT_TOKENS = re.compile(r"^tokens per iteration will be: ([\d,]{1,15})")
_RUN = re.compile(r"^run\s+(\S.{0,200})$")
_HALF = re.compile(r"\b(?:float16|fp16)\b", re.IGNORECASE)
# nanoGPT's names for what a question calls otherwise.
NANOGPT_FIELDS = {
    "n_layer": "layers", "n_head": "heads", "n_embd": "width", "block_size": "seq_len",
    "batch_size": "device_batch_size", "gradient_accumulation_steps": "grad_accum_steps",
    "dropout": "dropout",
}  # fmt: skip
# train.py as it comes, read in https://github.com/karpathy/nanoGPT/blob/master/train.py
NANOGPT_DEFAULTS: dict[str, Any] = {
    "layers": 12, "heads": 12, "width": 768, "seq_len": 1024, "device_batch_size": 12,
    "grad_accum_steps": 40,
}  # fmt: skip


class ProgramRun(msgspec.Struct, frozen=True, kw_only=True):
    """What ran. `question` is None where no plan of ours can stand for it; `words` are its command.

    `assumed` are things that the log does not say, in words; `half` whether it computed in fp16.
    """

    name: ProgramName
    words: tuple[str, ...] = ()
    question: Question | None = None
    plan: Plan | None = None
    run: str | None = None  # the folder of a run of snugpt
    steps: int | None = None  # the last step that was logged
    fields: dict[str, Any] = {}
    half: bool = False
    assumed: tuple[str, ...] = ()

    @property
    def batch(self) -> int | None:
        """Sequences on the device at once, where that is known."""
        if self.plan is not None and isinstance(self.plan.recipe, TrainingRecipe):
            return self.plan.recipe.device_batch_size
        return _whole(self.fields.get("device_batch_size", self.fields.get("batch_size")))

    @property
    def seq_len(self) -> int | None:
        """Tokens of one sequence, where that is known."""
        if self.plan is not None and isinstance(self.plan.recipe, TrainingRecipe):
            return self.plan.recipe.seq_len
        said = self.fields.get("seq_len", 2048 if self.name == "nanochat" else None)
        return _whole(said)


def program_of(lines: Sequence[Line], until: int, plan: Plan | None = None) -> ProgramRun:
    """Return the program behind a log that failed at line `until`; `plan` is of a snugpt run."""
    texts = [line.text for line in lines[: until + 1]]  # what ran after it says nothing of it
    words = command_words(texts)
    common: dict[str, Any] = {
        "words": words,
        "steps": _last_step(texts),
        "half": any(_HALF.search(text) for text in texts if _says_dtype(text)),
    }
    run = next((found[1].strip() for text in texts if (found := _RUN.match(text))), None)
    if plan is not None:
        return ProgramRun(name="snugpt", question=plan.question, plan=plan, run=run, **common)
    if words and _is_snugpt(words):
        fields = dict(flags_of(words))
        question = None if plan_file_of(words) else _question(fields)
        return ProgramRun(name="snugpt", question=question, run=run, fields=fields, **common)
    script = script_of(texts)
    if script is not None and script != "base_train":
        only = f"only nanochat's base_train is planned, not {script}"
        fields = dict(flags_of(words))
        return ProgramRun(name="nanochat", fields=fields, assumed=(only,), **common)
    if script is not None or is_pretraining(texts):
        fields, assumed = nanochat_fields(texts, words)
        return ProgramRun(
            name="nanochat", question=_question(fields), fields=fields, assumed=assumed, **common
        )
    if _is_nanogpt(texts, words):
        fields = NANOGPT_DEFAULTS | dict(_nanogpt_settings(texts, words))
        return ProgramRun(name="nanogpt", fields=fields, **common)
    return ProgramRun(name="other", fields=dict(flags_of(words)), **common)


def plan_places(lines: Sequence[Line]) -> tuple[str | None, str | None]:
    """The folder that a run of snugpt said it writes to, and the plan that its command names."""
    texts = [line.text for line in lines]
    folder = next((found[1].strip() for text in texts if (found := _RUN.match(text))), None)
    words = command_words(texts) if folder is not None else ()
    return folder, plan_file_of(words)


def plan_file_of(words: Sequence[str]) -> str | None:
    """The plan.json among the words of a command of snugpt."""
    return next((word for word in words if word.endswith(".json") and word[0] != "-"), None)


def _says_dtype(text: str) -> bool:
    return "dtype" in text.lower() or "precision" in text.lower() or "--fp16" in text


def _last_step(texts: Sequence[str]) -> int | None:
    return next((int(found[1]) for text in reversed(texts) if (found := STEP.search(text))), None)


def _is_snugpt(words: Sequence[str]) -> bool:
    return words[0].rpartition("/")[2] == "snugpt" or "snugpt.cli" in words


def _is_nanogpt(texts: Sequence[str], words: Sequence[str]) -> bool:
    if any(_NANOGPT_TOKENS.match(text) for text in texts):
        return True
    looped = any(re.search(r"\biter \d+: loss \S+, time [\d.]+ms", text) for text in texts)
    return looped or any(word.startswith("config/train_") for word in words)


def _nanogpt_settings(texts: Sequence[str], words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Settings as its configurator prints them, and over them the flags."""
    inside = False
    said: dict[str, str] = {}
    for text in texts:
        inside = inside or text.startswith("Overriding config with ")
        if text.startswith(("tokens per iteration", "found vocab_size", "Traceback")):
            inside = False
        setting = OVERRIDING.match(text) or (SETTING.match(text) if inside else None)
        if setting:
            said[setting[1]] = setting[2]
    said |= dict(flags_of(words))
    for name, field in NANOGPT_FIELDS.items():
        number = _number(said.get(name, ""))
        if number is not None:
            yield field, number


def _whole(value: object) -> int | None:
    text = str(value)
    return int(text) if text.isdecimal() and len(text) < 12 else None


def _number(text: str) -> int | float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    if not -1e15 < number < 1e15:  # also refuses NaN
        return None
    return int(number) if number == int(number) else number


def _question(fields: dict[str, Any]) -> Question | None:
    """The question of fields in words; None where one is no value of it."""
    known = {ALIASES.get(name, name): value for name, value in fields.items()}
    known = {name: value for name, value in known.items() if name in Question.__struct_fields__}
    try:
        return msgspec.convert(known, Question, strict=False)
    except (msgspec.ValidationError, SnugError, ValueError):
        return None

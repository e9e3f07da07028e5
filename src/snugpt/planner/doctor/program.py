"""Which program wrote a log, and with what settings: its own words, turned into our question.

snugpt's runs have a plan; nanochat and nanoGPT print their settings; of any other program the
command line is what there is. Everything here is taken from a log, which anyone can have written:
it ends as typed fields or as quoted words, never as shell text.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from snugpt.errors import SnugError
from snugpt.estimate.stacks.nanochat.versions import FEBRUARY, JULY, OCTOBER, Version
from snugpt.planner.doctor.messages import STEP
from snugpt.planner.doctor.reading import Line
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.plan import Plan
from snugpt.spec.question import ALIASES, Question
from snugpt.spec.recipe import TrainingRecipe

ProgramName = Literal["snugpt", "nanochat", "nanogpt", "other"]
MOST_WORDS = 200
MOST_JOINED_LINES = 40
LAUNCHERS = ("torchrun", "python", "accelerate", "deepspeed", "snugpt")
_LAUNCHER = re.compile(r"(?:torchrun|python[\d.]{0,5}|accelerate|deepspeed|snugpt)")
_VARIABLE = re.compile(r"\w{1,60}=")
_OVERRIDING = re.compile(r"^Overriding: (\w{1,40}) = (.{1,80})$")
_SETTING = re.compile(r"^\s*\"?(\w{1,40})\"?\s*[=:]\s*([\w.+-]{1,40})\s*,?\s*(?:#.*)?$")
_GPU = re.compile(r"^GPU: (.{2,60}?) \| Peak FLOPS")
_MICRO_BATCH = re.compile(r"Tokens / micro-batch / rank: (\d{1,9}) x (\d{1,9}) = ([\d,]{1,15})")
_WORLD_BATCH = re.compile(r"Tokens / micro-batch: ([\d,]{1,15})")
_TOTAL_BATCH = re.compile(r"Total batch size ([\d,]{1,15}) => gradient accumulation steps")
_NANOGPT_TOKENS = re.compile(r"^tokens per iteration will be: ([\d,]{1,15})")
_SCRIPT = re.compile(r"\bscripts[./](base_\w{1,20}|mid_train|chat_\w{1,20})")
_OLD_LAYERS = re.compile(r"^num_layers: \d")
_PROC = re.compile(r"--nproc[-_]per[-_]node[= ](\d{1,4})")
_RUN = re.compile(r"^run\s+(\S.{0,200})$")
_HALF = re.compile(r"\b(?:float16|fp16)\b", re.IGNORECASE)
_NANOCHAT_FIELDS = {
    option.replace("-", "_"): field
    for version in (OCTOBER, JULY)
    for field, option in version.options.items()
}
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
    words = _command(texts)
    common: dict[str, Any] = {
        "words": words,
        "steps": _last_step(texts),
        "half": any(_HALF.search(text) for text in texts if _says_dtype(text)),
    }
    run = next((found[1].strip() for text in texts if (found := _RUN.match(text))), None)
    if plan is not None:
        return ProgramRun(name="snugpt", question=plan.question, plan=plan, run=run, **common)
    if words and _is_snugpt(words):
        fields = dict(_flags(words))
        question = None if plan_file_of(words) else _question(fields)
        return ProgramRun(name="snugpt", question=question, run=run, fields=fields, **common)
    script = _script(texts)
    if script is not None and script != "base_train":
        only = f"only nanochat's base_train is planned, not {script}"
        fields = dict(_flags(words))
        return ProgramRun(name="nanochat", fields=fields, assumed=(only,), **common)
    if script is not None or any(_MICRO_BATCH.search(text) for text in texts):
        return _nanochat(texts, common)
    if _is_nanogpt(texts, words):
        fields = NANOGPT_DEFAULTS | dict(_nanogpt_settings(texts, words))
        return ProgramRun(name="nanogpt", fields=fields, **common)
    return ProgramRun(name="other", fields=dict(_flags(words)), **common)


def plan_places(lines: Sequence[Line]) -> tuple[str | None, str | None]:
    """The folder that a run of snugpt said it writes to, and the plan that its command names."""
    texts = [line.text for line in lines]
    folder = next((found[1].strip() for text in texts if (found := _RUN.match(text))), None)
    words = _command(texts) if folder is not None else ()
    return folder, plan_file_of(words)


def plan_file_of(words: Sequence[str]) -> str | None:
    """The plan.json among the words of a command of snugpt."""
    return next((word for word in words if word.endswith(".json") and word[0] != "-"), None)


def _says_dtype(text: str) -> bool:
    return "dtype" in text.lower() or "precision" in text.lower() or "--fp16" in text


def _last_step(texts: Sequence[str]) -> int | None:
    return next((int(found[1]) for text in reversed(texts) if (found := STEP.search(text))), None)


def _command(texts: Sequence[str]) -> tuple[str, ...]:
    """The words of the last command line that trains; lines ended by a backslash are one."""
    found: tuple[str, ...] = ()
    for at, text in enumerate(texts):
        if 'File "' in text or not any(name in text for name in LAUNCHERS):
            continue
        whole, next_at = text, at + 1
        while whole.endswith("\\") and next_at < min(len(texts), at + MOST_JOINED_LINES):
            whole = whole[:-1] + " " + texts[next_at]
            next_at += 1
        words = _from_launcher(whole)
        if any(word.startswith("--") or word.endswith(".py") for word in words):
            found = words
    return found


def _from_launcher(text: str) -> tuple[str, ...]:
    """The words from the program that is started, variables set before it included."""
    raw = text.split()[:MOST_WORDS]
    for at, word in enumerate(raw):
        if _LAUNCHER.fullmatch(word.rpartition("/")[2]):
            while at > 0 and _VARIABLE.match(raw[at - 1]):
                at -= 1
            return _words(" ".join(raw[at:]))
    return ()


def _words(text: str) -> tuple[str, ...]:
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # an open quote
        return ()
    for end in ("|", "&&", ";", "2>&1", ">", ">>", "&"):
        if end in words:
            words = words[: words.index(end)]
    return tuple(words[:MOST_WORDS])


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--a=b`, `--a b` and `--a` as pairs of a name with underscores and its text."""
    at = 0
    while at < len(words):
        name, equals, value = words[at].partition("=")
        at += 1
        if not name.startswith("--") or len(name) < 3:
            continue
        if not equals:
            value = "true"
            if at < len(words) and not words[at].startswith("--"):
                value = words[at]
                at += 1
        yield name[2:].replace("-", "_"), value


def _is_snugpt(words: Sequence[str]) -> bool:
    return words[0].rpartition("/")[2] == "snugpt" or "snugpt.cli" in words


def _script(texts: Sequence[str]) -> str | None:
    """The last of nanochat's programs that is named: its speedrun starts one after the other."""
    for text in reversed(texts):
        named = _SCRIPT.findall(text) if "scripts" in text else []
        if named:
            return str(named[-1])
    return None


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
        setting = _OVERRIDING.match(text) or (_SETTING.match(text) if inside else None)
        if setting:
            said[setting[1]] = setting[2]
    said |= dict(_flags(words))
    for name, field in NANOGPT_FIELDS.items():
        number = _number(said.get(name, ""))
        if number is not None:
            yield field, number


def _nanochat(texts: Sequence[str], common: dict[str, Any]) -> ProgramRun:
    words: tuple[str, ...] = common["words"]
    flags = dict(_flags(words))
    overridden = {
        found[1]: found[2] for text in texts if (found := _OVERRIDING.match(text)) is not None
    }
    version, assumed = _version(texts, words, bool(overridden))
    said = {
        _NANOCHAT_FIELDS[name]: value
        for name, value in (flags | overridden).items()
        if name in _NANOCHAT_FIELDS and _NANOCHAT_FIELDS[name] in version.options
    }
    said = {field: value for field, value in said.items() if value != "-1"}  # nanochat's "unset"
    said |= dict(_nanochat_prints(texts))
    said.setdefault("depth", "20")
    said.setdefault("device_batch_size", "32")
    cards = _num_gpus(texts, words)
    fields: dict[str, Any] = {"stack": version.name, **said}
    if cards is not None:
        fields["num_gpus"] = cards
    torchrun = any(word.rpartition("/")[2] == "torchrun" for word in words)
    if torchrun or (cards or 1) > 1:
        fields["launcher"] = "torchrun"
    fields.pop("fp8", None)
    if version.fp8 and ("fp8" in flags or any("FP8 training enabled" in text for text in texts)):
        fields["fp8"] = True
    gpu = next((found[1] for text in texts if (found := _GPU.match(text))), None)
    if gpu is not None:
        fields["gpu"] = _card_id(gpu)
    return ProgramRun(
        name="nanochat", question=_question(fields), fields=fields, assumed=assumed, **common
    )


def _nanochat_prints(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What it prints of a run after reading its flags: that is what ran."""
    for text in texts:
        rows = _MICRO_BATCH.search(text)
        if rows:
            yield "device_batch_size", rows[1]
            yield "seq_len", rows[2]
        total = _TOTAL_BATCH.search(text)
        if total:
            yield "total_batch_tokens", total[1].replace(",", "")
        setting = _SETTING.match(text)
        if setting and setting[1] in ("n_layer", "num_layers") and setting[2].isdigit():
            yield "depth", setting[2]
        vocabulary = re.match(r"^Vocab size: ([\d,]{1,12})$", text)
        if vocabulary:
            yield "vocab_size", vocabulary[1].replace(",", "")


def _version(
    texts: Sequence[str], words: Sequence[str], overridden: bool
) -> tuple[Version, tuple[str, ...]]:
    """nanochat's version by what only it prints."""
    windows = any("window_pattern" in text for text in texts)
    if not windows and (overridden or any(_OLD_LAYERS.match(text) for text in texts)):
        return OCTOBER, ()
    if any(text.startswith("COMPUTE_DTYPE: ") for text in texts):
        return JULY, ("nanochat of March 2026 and later print the same; taken for July's",)
    if windows:
        return FEBRUARY, ()
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    if any("_" in name and "nproc" not in name for name in names):
        return OCTOBER, ("the version is not in the log; taken for October 2025 by its flags",)
    return JULY, (f"the version is not in the log; taken for {JULY.name}",)


def _num_gpus(texts: Sequence[str], words: Sequence[str]) -> int | None:
    joined = " ".join(words)
    said = _PROC.search(joined)
    if said:
        return int(said[1])
    one = next((found for text in texts if (found := _MICRO_BATCH.search(text))), None)
    world = next((found for text in texts if (found := _WORLD_BATCH.search(text))), None)
    if one and world:
        return max(1, int(world[1].replace(",", "")) // max(1, int(one[3].replace(",", ""))))
    return None


def _card_id(name: str) -> str | None:
    try:
        return find_gpu(name).id
    except SnugError:
        return None


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

"""What nanochat prints of a run, and how it was started, as the fields of our question."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from snugpt.errors import SnugError
from snugpt.estimate.stacks.nanochat.versions import FEBRUARY, JULY, OCTOBER, Version
from snugpt.planner.doctor.commands import flags_of
from snugpt.spec.catalogue import find_gpu

OVERRIDING = re.compile(r"^Overriding: (\w{1,40}) = (.{1,80})$")  # nanoGPT prints it too
SETTING = re.compile(r"^\s*\"?(\w{1,40})\"?\s*[=:]\s*([\w.+-]{1,40})\s*,?\s*(?:#.*)?$")
_GPU = re.compile(r"^GPU: (.{2,60}?) \| Peak FLOPS")
_MICRO_BATCH = re.compile(r"Tokens / micro-batch / rank: (\d{1,9}) x (\d{1,9}) = ([\d,]{1,15})")
_WORLD_BATCH = re.compile(r"Tokens / micro-batch: ([\d,]{1,15})")
_TOTAL_BATCH = re.compile(r"Total batch size ([\d,]{1,15}) => gradient accumulation steps")
_SCRIPT = re.compile(r"\bscripts[./](base_\w{1,20}|mid_train|chat_\w{1,20})")
_OLD_LAYERS = re.compile(r"^num_layers: \d")
_PROC = re.compile(r"--nproc[-_]per[-_]node[= ](\d{1,4})")
_NANOCHAT_FIELDS = {
    option.replace("-", "_"): field
    for version in (OCTOBER, JULY)
    for field, option in version.options.items()
}


def script_of(texts: Sequence[str]) -> str | None:
    """Return the last of nanochat's programs that is named; its speedrun starts several."""
    for text in reversed(texts):
        named = _SCRIPT.findall(text) if "scripts" in text else []
        if named:
            return str(named[-1])
    return None


def is_pretraining(texts: Sequence[str]) -> bool:
    """Whether a log has what its training prints of a batch."""
    return any(_MICRO_BATCH.search(text) for text in texts)


def nanochat_fields(
    texts: Sequence[str], words: Sequence[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields of the run's question, in words, and what was assumed of it."""
    flags = dict(flags_of(words))
    overridden = {
        found[1]: found[2] for text in texts if (found := OVERRIDING.match(text)) is not None
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
    return fields, assumed


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
        setting = SETTING.match(text)
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

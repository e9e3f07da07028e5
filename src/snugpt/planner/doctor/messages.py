"""Messages of PyTorch, torchrun, the kernel and loops, as events.

Where the formats of a message were read is said at each; tests/planner/reports.py has real ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from snugpt.planner.doctor.memory_message import OUT_OF_MEMORY, out_of_memory
from snugpt.planner.doctor.place import place_of
from snugpt.planner.doctor.reading import Line
from snugpt.planner.doctor.report import (
    BackwardTwice,
    CollectiveTimeout,
    Event,
    Killed,
    NoKernels,
    NotANumber,
    SharedMemory,
)
from snugpt.units import KIB

MOST_EVENTS = 256
BACKWARD_TWICE = "Trying to backward through the graph a second time"
# A step's line: nanochat ("step 00012/05000 (0.24%) | loss: 3.2"), nanoGPT ("iter 3010: loss nan"),
# snugpt ("step    12/500  loss 3.241"), modded-nanogpt ("step:12/500 train_loss:...").
STEP = re.compile(
    r"\b(?:step|iter|iteration)\b[ :=]{1,8}(\d{1,12})(?:/(\d{1,12}))?(?![\d.]).{0,40}?loss",
    re.IGNORECASE,
)
_LOSS = re.compile(
    r"\b(?:(?:train|val|validation|test|smooth|eval)[ _/])?(loss|bpb|perplexity|grad[ _]norm)['\"]?"
    r"\s{0,3}(?:is|[:=])?\s{0,3}(?:tensor\()?"
    r"([+-]?(?:nan|inf(?:inity)?|\d{1,12}(?:\.\d{0,20})?(?:e[+-]?\d{1,3})?))(?![\w.])",
    re.IGNORECASE,
)
# SIGKILL: torchrun's table and its line, shells, Docker, Slurm, and the kernel's own report
# (https://github.com/lzhxmu/CPPO/issues/6, https://github.com/hpcaitech/ColossalAI/issues/3514,
# https://github.com/chenhsuanlin/spatial-transformer-GAN/issues/35); Slurm's and the kernel's from
# memory.
_KILLED = re.compile(
    r"Signal 9 \(SIGKILL\)|exitcode\s*:\s*-9\b|signals?\.SIGKILL|OOMKilled|oom[-_]kill"
    r"|\bexit(?:ed)?(?: with)?(?: status)?(?: code)?[ :=]{1,3}137\b|status code 137\b"
    r"|Out of memory: Kill(?:ed)? process|killed by signal: Killed"
    r"|^\s*(?:\S{1,200}:\s{1,4}(?:line \d{1,6}:\s{1,4})?)?(?:\d{1,9}\s{1,4})?Killed(?:\s|$)"
)
_PROVEN = re.compile(r"OOMKilled|oom[-_]kill|Out of memory: Kill(?:ed)? process")
_RESIDENT = re.compile(r"anon-rss:(\d{1,15})kB")
_TABLE_RANK = re.compile(r"^\s*rank\s*:\s*(\d{1,5})")
_LOCAL_RANK = re.compile(r"local_rank: (\d{1,5})")
_SHARED = re.compile(
    r"insufficient shared memory \(shm\)|workers are out of shared memory"
    r"|unable to (?:open|allocate) shared memory"
)
# https://github.com/XPixelGroup/BasicSR/issues/737, https://github.com/pytorch/pytorch/issues/118369
_TIMEOUT = re.compile(
    r"(?:\[Rank (\d{1,5})\])?\s*Watchdog caught collective operation timeout: "
    r"WorkNCCL\(SeqNum=(\d{1,15}), OpType=(\w{1,40}),.{0,200}?Timeout\(ms\)=(\d{1,15})"
)
# https://github.com/pytorch/pytorch/issues/52736, https://github.com/Nerogar/OneTrainer/issues/755
_NO_KERNELS = re.compile(
    r"no kernel image is available for execution"
    r"|with CUDA capability sm_(\d{1,3}) is not compatible"
)
_CARD = re.compile(r"([\w .-]{2,60}) with CUDA capability sm_\d")
# Nothing else is looked at: every pattern needs one of these words in its line, in any case.
FAILURES = (
    "memory", "out of", "defaultcpu", "alloc_failed", "second time", "kill", "exit", "137",
    "watchdog", "kernel image", "capability sm_",
)  # fmt: skip
ODD_NUMBERS = ("nan", "inf")
MOST_LINES_BACK = 5000  # from a loss that is no number to the last that was


def events_in(lines: Sequence[Line]) -> tuple[Event, ...]:
    """Return the failures that a log shows, in its order; of losses the first that is no number."""
    found: list[Event] = []
    diverged = False
    for at, line in enumerate(lines):
        low = line.text.lower()
        event: Event | None = None
        if any(word in low for word in FAILURES) or low.endswith("out"):
            event = _event(lines, at)
        if event is None and not diverged and any(word in low for word in ODD_NUMBERS):
            event = _not_a_number(lines, at)
            diverged = event is not None
        if event is not None and len(found) < MOST_EVENTS:
            found.append(event)
    return tuple(found)


def _event(lines: Sequence[Line], at: int) -> Event | None:
    text, rank = lines[at]
    if OUT_OF_MEMORY.search(text) and not _PROVEN.search(text):
        return out_of_memory(lines, at)
    if BACKWARD_TWICE in text:
        return BackwardTwice(line=at, rank=rank, place=place_of(lines, at))
    timeout = _TIMEOUT.search(text)
    if timeout:
        who = int(timeout[1]) if timeout[1] else rank
        return CollectiveTimeout(
            line=at,
            rank=who,
            ranks=() if who is None else (who,),
            operation=timeout[3],
            timeout_s=int(timeout[4]) / 1000,
            sequence=() if who is None else ((who, int(timeout[2])),),
        )
    if _SHARED.search(text):
        return SharedMemory(line=at, rank=rank)
    if _KILLED.search(text):
        return _killed(lines, at)
    kernels = _NO_KERNELS.search(text)
    return _no_kernels(text, at, rank, kernels[1]) if kernels else None


def _killed(lines: Sequence[Line], at: int) -> Killed:
    text, rank = lines[at]
    resident = _RESIDENT.search(text)
    if rank is None:  # torchrun's table has the rank on the line before
        above = "\n".join(line.text for line in lines[max(0, at - 3) : at])
        named = _LOCAL_RANK.search(text) or _TABLE_RANK.search(above.rpartition("\n")[2])
        rank = int(named[1]) if named else None
    return Killed(
        line=at,
        rank=rank,
        proven=bool(_PROVEN.search(text)),
        resident_bytes=int(resident[1]) * KIB if resident else None,
        text=text.strip()[:100],
    )


def _no_kernels(text: str, at: int, rank: int | None, digits: str | None) -> NoKernels:
    card = _CARD.search(text)
    return NoKernels(
        line=at,
        rank=rank,
        card=card[1].strip() if card else None,
        capability=(int(digits) // 10, int(digits) % 10) if digits else None,
    )


def _not_a_number(lines: Sequence[Line], at: int) -> NotANumber | None:
    """The event of a line whose loss is no number, with the step and the last loss that was one."""
    odd = [(name, value) for name, value in _LOSS.findall(lines[at].text) if not _is_finite(value)]
    if not odd:
        return None
    step, last = None, None
    for line in reversed(lines[max(0, at - MOST_LINES_BACK) : at + 1]):
        low = line.text.lower()
        if "loss" not in low:
            continue
        numbered = STEP.search(line.text)
        step = int(numbered[1]) if step is None and numbered else step
        finite = [
            float(value)
            for name, value in _LOSS.findall(line.text)
            if name.lower() == "loss" and _is_finite(value)
        ]
        if finite:
            last = finite[-1]
            break
    name, value = odd[0]
    return NotANumber(
        line=at,
        rank=lines[at].rank,
        what=name.lower(),
        value=value.lower(),
        step=step,
        last_finite=last,
    )


def _is_finite(value: str) -> bool:
    return math.isfinite(float(value))

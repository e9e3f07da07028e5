"""Mends that need no plan: what a message's own numbers call for, and other programs' own flags.

Nothing here was planned, so nothing is promised: `fits` is None. What is certain is said in bytes
where the message has them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from snugpt.errors import SnugError
from snugpt.planner.doctor.commands import with_flags, with_variable
from snugpt.planner.doctor.diagnosis import cause_of, hidden_bytes
from snugpt.planner.doctor.mends import Mend
from snugpt.planner.doctor.program import ProgramRun
from snugpt.planner.doctor.report import (
    BackwardTwice,
    CollectiveTimeout,
    Event,
    Killed,
    NoKernels,
    NotANumber,
    OutOfMemory,
    SharedMemory,
)
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.recipe import TrainingRecipe

# Batch and accumulation as loops name them; the first that was said is the one that is changed.
BATCH_FLAGS = (
    "device_batch_size", "per_device_train_batch_size", "micro_batch_size", "train_batch_size",
    "batch_size", "bs",
)  # fmt: skip
PASSES_FLAGS = ("gradient_accumulation_steps", "grad_accum_steps", "accumulate_grad_batches")
LENGTH_FLAGS = ("max_seq_len", "block_size", "seq_len", "max_seq_length", "model_max_length")
RATE_FLAGS = ("learning_rate", "lr", "matrix_lr", "matrix_learning_rate")
# nanoGPT's own, where the command does not say them.
NANOGPT_FLAGS = {
    "batch_size": "device_batch_size",
    "gradient_accumulation_steps": "grad_accum_steps",
}
NVIDIA_FALLBACK = "https://nvidia.custhelp.com/app/answers/detail/a_id/5490"
KERNEL_LOG = "sudo dmesg -T | grep -i -E 'killed|oom'"
SAVED_TENSORS = "activations made again in backward (torch.utils.checkpoint around each layer)"


def first_mends(event: Event, run: ProgramRun) -> tuple[Mend, ...]:
    """Return what comes before a smaller run: what is wrong around it."""
    if not isinstance(event, OutOfMemory):
        return ()
    return tuple(_around(event, run))


def general_mends(event: Event, run: ProgramRun) -> tuple[Mend, ...]:
    """Return the mends where no plan can stand for the run."""
    if isinstance(event, OutOfMemory):
        on_host = event.backend == "cpu"
        return tuple(_of_host(run) if on_host else _of_card(run))
    if isinstance(event, Killed):
        look = Mend(change="see who was killed, and why", kind="exact", command=KERNEL_LOG)
        return look, *_of_host(run)
    if isinstance(event, NotANumber):
        return tuple(_of_numbers(run))
    if isinstance(event, BackwardTwice):
        return tuple(_of_graph(event))
    if isinstance(event, CollectiveTimeout):
        return tuple(_of_waiting(run))
    if isinstance(event, SharedMemory):
        return (
            Mend(change="more shared memory: docker run --shm-size=8g ...", kind="exact"),
            Mend(change="no worker processes: num_workers=0", kind="exact"),
        )
    return tuple(_of_build(event))


def _around(event: OutOfMemory, run: ProgramRun) -> Iterator[Mend]:
    cause, command = cause_of(event), shlex.join(run.words) or None
    if cause == "fragmented" and event.setting is not None and run.name != "nanochat":
        yield Mend(
            change="let the allocator join its pieces",
            kind="exact",
            command=with_variable(event.setting, command),
            saves_bytes=event.cached_bytes,
        )
    if cause == "others":
        for other in event.others[:3]:
            yield Mend(
                change=f"end process {other.pid}, if it is yours",
                kind="exact",
                command=f"ps -o pid,user,etime,args -p {other.pid}",
                saves_bytes=other.bytes,
            )
        if hidden_bytes(event):
            yield Mend(
                change="end what else runs on the card",
                kind="exact",
                command="nvidia-smi",
                saves_bytes=hidden_bytes(event),
            )
    if cause == "limited":
        yield Mend(change="raise torch.cuda.set_per_process_memory_fraction", kind="exact")
    if cause == "spilled":
        yield Mend(
            change=f"to fail early instead: CUDA - Sysmem Fallback Policy, {NVIDIA_FALLBACK}",
            kind="exact",
        )
    if cause == "unexplained":
        look = "ulimit -v; nvidia-smi" if event.backend == "cuda" else "ulimit -v"
        yield Mend(change="look for limits and neighbours", kind="exact", command=look)


def _of_card(run: ProgramRun) -> Iterator[Mend]:
    yield from _half_batch(run)
    yield Mend(change=SAVED_TENSORS, kind="exact")
    yield Mend(change="logits in chunks, so that no tensor is tokens x vocabulary", kind="exact")
    yield Mend(change="moments in 8 bits, or weights in bf16", kind="inexact")
    yield from _half_length(run)


def _half_batch(run: ProgramRun) -> Iterator[Mend]:
    """Half the batch and twice the passes: the same step, in the program's own flags."""
    batch = next(((flag, run.fields[flag]) for flag in BATCH_FLAGS if flag in run.fields), None)
    flag, passes_flag, passes = batch[0] if batch else "", "", 1
    if run.name == "nanogpt":
        flag, passes_flag = "batch_size", "gradient_accumulation_steps"
        passes = int(run.fields[NANOGPT_FLAGS[passes_flag]])
    else:
        passes_flag = next((name for name in PASSES_FLAGS if name in run.fields), "")
        passes = _whole(run.fields.get(passes_flag)) or 1
    size = run.batch if run.name == "nanogpt" else _whole(batch[1]) if batch else None
    if not size or size == 1:
        if size is None:
            yield Mend(change="half the batch on the card, twice the accumulation", kind="exact")
        return
    # What is odd has no half; the largest part that divides keeps the step as it is.
    part = next(n for n in range(2, size + 1) if size % n == 0)
    changes = {flag: size // part}
    if passes_flag:
        changes[passes_flag] = passes * part
    said = ", ".join(f"{name} {value}" for name, value in changes.items())
    exact = "" if passes_flag else f", and {part} x the accumulation"
    command = with_flags(run.words, changes) if run.words else None
    yield Mend(change=said + exact, kind="exact", command=command)


def _half_length(run: ProgramRun) -> Iterator[Mend]:
    flag = next((name for name in LENGTH_FLAGS if name in dict(run.fields)), None)
    length = _whole(run.fields.get(flag)) if flag else None
    if run.name == "nanogpt":
        flag, length = "block_size", run.seq_len
    if not flag or not length or length < 2:
        yield Mend(change="half the context", kind="model")
        return
    command = with_flags(run.words, {flag: length // 2}) if run.words else None
    yield Mend(change=f"{flag} {length // 2}", kind="model", command=command)


def _of_host(run: ProgramRun) -> Iterator[Mend]:
    yield Mend(change="fewer loader workers (each holds its own copy): num_workers=0", kind="exact")
    more = "more memory for the container (docker run --memory), or swap"
    yield Mend(change=more, kind="exact", command="free -h")
    if run.words and "cpu" in " ".join(run.words):
        yield from _half_batch(run)


def _of_numbers(run: ProgramRun) -> Iterator[Mend]:
    if run.half:
        name = next((n for n in ("dtype", "compute_dtype") if n in run.fields), "dtype")
        known = run.words and (run.name == "nanogpt" or name in run.fields)
        command = with_flags(run.words, {name: "bfloat16"}) if known else None
        yield Mend(
            change="bf16, on a card of capability 8.0 and up", kind="inexact", command=command
        )
        command = with_flags(run.words, {name: "float32"}) if known else None
        yield Mend(change="fp32, on any card", kind="exact", command=command)
    yield from _lower_rate(run)
    yield Mend(change="gradients clipped at norm 1", kind="inexact")
    yield Mend(change="go on from the last checkpoint before it", kind="exact")


def _lower_rate(run: ProgramRun) -> Iterator[Mend]:
    """A third of the rate that was said, or of the plan's."""
    if run.plan is not None and isinstance(run.plan.recipe, TrainingRecipe):
        schedule = run.plan.recipe.schedule
        assert schedule is not None
        lower = {
            "learning-rate": f"{schedule.learning_rate / 3:.3g}",
            "matrix-learning-rate": f"{schedule.matrix_learning_rate / 3:.3g}",
        }
        words = run.words or tuple(shlex.split(run.plan.command.replace(" plan ", " train ", 1)))
        yield Mend(change="a third of the rates", kind="inexact", command=with_flags(words, lower))
        return
    for flag in RATE_FLAGS:
        try:
            rate = float(str(run.fields.get(flag)))
        except ValueError:
            continue
        if 0 < rate < 1e4:
            text = f"{rate / 3:.3g}"
            command = with_flags(run.words, {flag: text}) if run.words else None
            yield Mend(change=f"{flag} {text}", kind="inexact", command=command)
            return
    yield Mend(change="a third of the learning rate", kind="inexact")


def _of_graph(event: BackwardTwice) -> Iterator[Mend]:
    at = f" at {event.place.where}" if event.place.where else ""
    yield Mend(change=f"compute the loss anew before each backward{at}", kind="exact")
    yield Mend(
        change="detach what is carried from step to step: hidden = hidden.detach()", kind="exact"
    )
    yield Mend(change="several losses: add them, one backward", kind="exact")
    yield Mend(
        change="backward(retain_graph=True) only where a second pass is meant: it keeps every"
        " activation alive",
        kind="exact",
    )


def _of_waiting(run: ProgramRun) -> Iterator[Mend]:
    command = shlex.join(run.words) or None
    traced = with_variable("TORCH_NCCL_TRACE_BUFFER_SIZE=2000 NCCL_DEBUG=INFO", command)
    look = "find the rank that does not come: every rank's own log"
    yield Mend(change=look, kind="exact", command=traced)
    yield Mend(
        change="one rank saves or evaluates alone: a longer time-out in"
        " init_process_group(timeout=...), or all ranks take part",
        kind="exact",
    )
    yield Mend(change="the network between the cards", kind="exact", command="nvidia-smi topo -m")


def _of_build(event: NoKernels) -> Iterator[Mend]:
    if event.card is not None:
        try:
            said = find_gpu(event.card).pytorch
            build, colon, command = said.partition(": ")
            yield Mend(change=f"another build of PyTorch ({build})" if colon else "a newer PyTorch",
                       kind="exact", command=command or None)  # fmt: skip
            return
        except SnugError:
            pass
    yield Mend(
        change="a build of PyTorch with kernels for the card", kind="exact", command="snugpt gpus"
    )


def _whole(value: object) -> int | None:
    text = str(value)
    return int(text) if text.isdecimal() and len(text) < 12 else None

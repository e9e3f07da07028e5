"""What a question's stack makes of it: options it lacks are refused, its rules and its command.

snugpt's own rules are in `subject.py` and `horizon.py`; what another program does differently is
asked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from snugpt.errors import BadQuestionError
from snugpt.estimate.fp8 import FIRST_FP8
from snugpt.estimate.stacks.catalogue import Stack, find_stack
from snugpt.estimate.stacks.nanochat.command import base_train_command, mend
from snugpt.planner.command import command_line, refused
from snugpt.spec.gpu import Gpu
from snugpt.spec.memory import MemoryEstimate
from snugpt.spec.question import Question
from snugpt.spec.recipe import Launcher, TrainingRecipe
from snugpt.spec.shape import ModelShape
from snugpt.units import gib

FLASH_3_MAJOR = 9  # elsewhere windows go through masks, before July and where no kernel is found
# Fields that the planner answers itself, whatever program runs the recipe.
_PLANNED = frozenset(
    {
        *("task", "stack", "gpu", "num_gpus", "launcher", "reserve", "objective", "depth"),
        *("seq_len", "vocab_size", "hours", "total_tokens", "num_iterations", "tokens_per_param"),
        *("batch_size", "total_batch_tokens", "device_batch_size", "grad_accum_steps", "exact"),
    }
)


def num_gpus_of(question: Question) -> int:
    """Return how many cards the recipe runs on."""
    return question.num_gpus or 1


def launcher_of(question: Question) -> Launcher:
    """Return how the program is started; one card defaults to python."""
    return question.launcher or ("torchrun" if num_gpus_of(question) > 1 else "python")


def refuse_what_the_stack_lacks(question: Question, said: dict[str, Any]) -> None:
    """Refuse by name what the program that will run the recipe can't do.

    Raises:
        BadQuestionError: an option, a value of a lever, or so many cards.
    """
    stack = find_stack(question.stack)
    if question.task == "generate" and stack.version is not None:
        raise _refusal(question, "task", "generate", "it is planned for training only")
    for field, value in said.items():
        if field == "weight_dtype" and question.task == "generate":
            continue  # there it is what generation computes in
        value = {True: "on", False: "off"}.get(value, value) if field == "fp8" else value
        if field in stack.levers:
            allowed = stack.levers[field]
            if value not in allowed:
                why = f"it has {' and '.join(allowed)} only" if field != "fp8" else "it has no FP8"
                if stack.version is not None:
                    why = dict(stack.version.lacks).get(field, why)
                raise _refusal(question, field, value, why)
        elif stack.version is not None and field not in _PLANNED | stack.options.keys():
            raise _refusal(question, field, value, "it has no such option")
    if question.fp8 and question.compile == "off" and stack.version is not None:
        raise _refusal(question, "fp8", "on", "without its compiler it is not derived")
    _refuse_cards(question, stack)
    ratio = question.tokens_per_param
    if ratio is not None and stack.name == "nanochat@2025-10" and ratio != int(ratio):
        raise _refusal(question, "tokens_per_param", ratio, "it takes whole numbers")


def _refuse_cards(question: Question, stack: Stack) -> None:
    number = num_gpus_of(question)
    if number > 1 and question.task == "generate":
        raise _refusal(question, "num_gpus", number, "it generates on one card")
    if number > 1 and question.launcher == "python":
        raise refused(
            f"launcher = 'python' is not allowed: {number} GPUs are started by torchrun",
            question,
            launcher="torchrun",
        )


def refuse_uneven_shards(question: Question, shape: ModelShape) -> None:
    """Refuse cards over which nanochat's AdamW can't divide the rows of an embedding.

    Raises:
        BadQuestionError: they do not divide; nanochat would stop with an assertion.
    """
    number = num_gpus_of(question)
    if shape.padded_vocab_size % number:
        raise refused(
            f"num_gpus = {number} is not allowed: it does not divide the {shape.padded_vocab_size}"
            " rows of the embedding, which are sharded",
            question,
            num_gpus=1 << (number.bit_length() - 1),
        )


def refuse_cards_without_bf16(question: Question, gpu: Gpu) -> None:
    """Refuse devices on which a stack's memory is not derived.

    Raises:
        BadQuestionError: no CUDA card with bf16, or no FP8 where that is asked for.
    """
    stack = find_stack(question.stack)
    if stack.version is None:
        return
    capability = gpu.capability or (0, 0)
    if gpu.backend != "cuda" or capability < (8, 0):
        raise refused(
            f"gpu = {gpu.id!r} is not allowed: {stack.name} is derived for CUDA cards with bf16,"
            " capability 8.0 and up",
            question,
            gpu="rtx-4090",
        )
    if question.fp8 and capability < FIRST_FP8:
        raise refused(
            f"--fp8 is not allowed: {gpu.name} has no FP8, capability 8.9 and up have",
            question,
            fp8=None,
        )


def _refusal(question: Question, field: str, value: Any, why: str) -> BadQuestionError:
    default = getattr(Question(), field)
    named = "--fp8" if field == "fp8" else f"{field} = {value!r}"  # a flag without a value
    return refused(
        f"{named} is not an option of {question.stack}: {why}",
        question,
        **{field: default},
    )


def run_command(
    question: Question, shape: ModelShape, recipe: TrainingRecipe, automatic_batch_tokens: int
) -> str:
    """Return the command that runs a recipe: ours, or the other program's own."""
    from snugpt.spec.question import said_fields

    version = find_stack(question.stack).version
    if version is None:
        return command_line(question)
    return base_train_command(
        version, shape.num_layers, recipe, said_fields(question),
        automatic_batch_tokens=automatic_batch_tokens,
    )  # fmt: skip


def what_could_be_had_back(
    recipe: TrainingRecipe, memory: MemoryEstimate, question: Question
) -> Iterator[str]:
    """Yield in words what nanochat's user could save, with the line that does it."""
    version = find_stack(question.stack).version
    assert version is not None
    held = sum(term.bytes for term in memory.terms if term.name.startswith("held "))
    if not held or memory.peak_phase == "optimizer":
        return
    if recipe.world_size == 1:
        yield (
            f"{gib(held)} could be had back: start it with python, not torchrun, which sends one"
            " card's gradients through NCCL"
        )
        return
    yield (
        f"{gib(held)} could be had back: buffers of the last optimizer step stay alive, because it"
        " waits on futures and not on the works themselves. One line in nanochat's folder mends it"
        " (untested on a GPU):"
    )
    yield mend(version)


def cautions(question: Question, shape: ModelShape, gpu: Gpu) -> Iterator[str]:
    """Yield what a reader of another program's estimate has to know."""
    version = find_stack(question.stack).version
    assert version is not None
    yield f"{version.name} is nanochat of {version.date}, commit {version.commit}"
    if shape.vocab_size != version.vocab_size:
        yield f"its vocabulary is its tokenizer's: train one of {shape.vocab_size} entries first"
    short = version.window_parts and "S" in shape.window_pattern
    if short and (gpu.capability or (0, 0))[0] != FLASH_3_MAJOR:
        yield (
            "sliding windows without FlashAttention 3 go through masks, which are not derived; one"
            " published run of that kind took 1.9 % less than predicted"
        )
    if num_gpus_of(question) > 1:
        yield "memory of NCCL beside PyTorch is assumed"

"""Generation: one recipe, its memory by division and its pace by the card's bandwidth."""

from __future__ import annotations

import msgspec

from snugpt.estimate.memory import peak_bytes, runtime_of, timeline_of
from snugpt.estimate.process import highest_process_bytes
from snugpt.estimate.speed import speed_estimate
from snugpt.planner.command import refused
from snugpt.planner.machine import Machine
from snugpt.planner.search import Candidate, compute_dtype, estimate
from snugpt.spec.question import Question
from snugpt.spec.recipe import GenerationRecipe
from snugpt.spec.shape import ModelShape

PROMPT_TOKENS = 512
MAX_NEW_TOKENS = 256
LARGEST_BATCH = 1 << 24


def generation_recipe(question: Question, shape: ModelShape, machine: Machine) -> GenerationRecipe:
    """Return the recipe of a settled question; what is not said is 512 tokens and 256 new ones.

    Both are cut to the model's context.

    Raises:
        BadQuestionError: the prompt and what follows it exceed the context.
    """
    context = shape.context_len
    prompt, new = question.prompt_tokens, question.max_new_tokens
    if new is None:
        free = context - prompt if prompt is not None else max(1, context // 2)
        new = max(1, min(MAX_NEW_TOKENS, free))
    if prompt is None:
        prompt = max(1, min(PROMPT_TOKENS, context - new))
    if prompt + new > context:
        mend = {"seq_len": None} if context == 1 else _within(context, prompt, new)
        raise refused(
            f"prompt_tokens = {prompt} and max_new_tokens = {new} exceed the context of {context}",
            question, **mend,
        )  # fmt: skip
    dtype = compute_dtype(question, machine)
    return GenerationRecipe(
        batch=question.batch or 1,
        prompt_tokens=prompt,
        max_new_tokens=new,
        kv_dtype=dtype,
        weight_dtype=dtype,
    )


def _within(context: int, prompt: int, new: int) -> dict[str, int]:
    """The nearest lengths that fit the context: fewer new tokens, else a shorter prompt too."""
    if prompt < context:
        return {"max_new_tokens": context - prompt}
    new = min(new, context - 1)
    return {"prompt_tokens": context - new, "max_new_tokens": new}


def generation_candidate(question: Question, shape: ModelShape, machine: Machine) -> Candidate:
    """Return the one recipe of a generation with its bytes and the seconds per token."""
    recipe = generation_recipe(question, shape, machine)
    runtime = runtime_of(shape, recipe, machine.gpu, machine.num_threads)
    process_bytes = highest_process_bytes(peak_bytes(shape, recipe, runtime), runtime, recipe)
    step_s = speed_estimate(shape, recipe, machine.gpu).step_s
    return Candidate(recipe, process_bytes, step_s)


def largest_batch(
    recipe: GenerationRecipe, question: Question, shape: ModelShape, machine: Machine
) -> int:
    """Return how many sequences fit at once: a division, checked by the whole estimate."""
    runtime = runtime_of(shape, recipe, machine.gpu, machine.num_threads)
    capacity = machine.capacity_bytes - question.reserve
    fixed = highest_process_bytes(0, runtime, recipe)
    factor = (highest_process_bytes(1 << 40, runtime, recipe) - fixed) / (1 << 40)
    lines = timeline_of(shape, recipe, runtime).envelope
    room = (capacity - fixed) / factor
    batch = min(
        int((room - line.fixed) // line.per_sequence) for line in lines if line.per_sequence
    )
    batch = min(batch, LARGEST_BATCH)
    while batch > 0:
        tried = msgspec.structs.replace(recipe, batch=batch)
        if estimate(tried, question, shape, machine).fits:
            break
        batch -= 1 + batch // 50
    return max(0, batch)

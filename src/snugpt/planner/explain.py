"""Why this plan: reasons in words, what was not chosen, and the ladder of time against bytes."""

from __future__ import annotations

from snugpt.estimate.memory import batch_of, runtime_of, timeline_of
from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.planner.draft import Draft
from snugpt.planner.levers import EXACT, SEARCHED, difference, is_exact
from snugpt.planner.search import TIE_SHARE, Candidate, Choice
from snugpt.spec.plan import Rejection, Rung
from snugpt.spec.question import Question
from snugpt.spec.recipe import LEVERS, TrainingRecipe
from snugpt.units import gib

MOST_REJECTIONS = 2
MOST_RUNGS = 12


def training_reasons(draft: Draft, choice: Choice) -> dict[str, str]:
    """Return why each field that was not pinned has its value."""
    asked, gpu = draft.asked, draft.machine.gpu
    recipe = choice.recipe
    assert isinstance(recipe, TrainingRecipe)
    reasons = {
        "total_batch_tokens": draft.batch.rule,
        "total_tokens": draft.tokens.rule,
    }
    if draft.depth_rule is not None:
        reasons["depth"] = draft.depth_rule
    if asked.compute_dtype is None:
        has = "has" if recipe.compute_dtype == "bf16" else "has no"
        several = recipe.compute_dtype == "fp32" and recipe.world_size > 1
        reasons["compute_dtype"] = (
            "bf16 is for CUDA 8.0 and up"
            if gpu.backend == "cpu"
            else f"{gpu.name} {has} bf16" + (", and fp16 is for one card" if several else "")
        )
    goal = "smallest" if asked.objective == "memory" else "fastest"
    goal += " that fits" if choice.memory.fits else " there is, and it does not fit"
    if not choice.memory.fits:
        goal = goal.replace("fastest", "smallest")
    chosen = ["device_batch_size"]
    if len(find_stack(asked.stack).levers["checkpoint"]) > 1:
        chosen.append("checkpoint")
    for field in chosen:
        if getattr(asked, field) is None:
            reasons[field] = goal
    for lever, default in SEARCHED.items():
        if getattr(asked, lever) is None and getattr(recipe, lever) != default:
            reasons[lever] = _why_pulled(lever, asked, goal)
    if asked.loss_chunk_tokens is None and recipe.loss == "chunked":
        reasons["loss_chunk_tokens"] = "logits of a chunk take at most 128 MiB"
    if asked.optimizer is None:
        preset = draft.question.optimizer is not None
        reasons["optimizer"] = f"preset {asked.preset}" if preset else "default"
    if asked.vocab_size is None and draft.corpus is not None and not draft.question.byte_tokens:
        reasons["vocab_size"] = f"for {draft.corpus.num_bytes / 1e6:.3g} MB of text"
    return reasons


def _why_pulled(lever: str, asked: Question, goal: str) -> str:
    """Why a searched lever is not at its default."""
    if lever == "sharding":
        return goal
    if asked.objective == "memory":
        return "smallest peak"
    if lever in EXACT:
        return "no exact set of levers fits"
    return "nothing that stays on the card fits"


def rejections(draft: Draft, choice: Choice) -> tuple[Rejection, ...]:
    """Return the next larger batches and the other way to checkpoint, each with what was wrong."""
    chosen = choice.recipe
    assert isinstance(chosen, TrainingRecipe)
    larger = [
        each
        for each in draft.found
        if not difference(_training(each), chosen)
        and _training(each).device_batch_size > chosen.device_batch_size
    ]
    found = [_rejected(draft, choice, each) for each in larger[-MOST_REJECTIONS:][::-1]]
    other = [each for each in draft.found if difference(_training(each), chosen)]
    best = min(
        (each for each in other if each.process_bytes <= draft.capacity_bytes),
        key=lambda each: each.step_s,
        default=other[-1] if other else None,
    )
    if best is not None:
        found.append(_rejected(draft, choice, best))
    return tuple(found)


def ladder(draft: Draft) -> tuple[Rung, ...]:
    """Return the front of step time against process bytes, fastest first.

    Of what fits, or of everything where nothing does.
    """
    pool = draft.fitting or list(draft.found)
    front: list[Candidate] = []
    for each in sorted(pool, key=lambda each: (each.step_s, each.process_bytes)):
        if not front or each.process_bytes < front[-1].process_bytes:
            front.append(each)
    if not front:
        return ()
    first = front[0]
    return tuple(
        Rung(
            levers=_levers(_training(each)),
            bytes_saved=first.process_bytes - each.process_bytes,
            time_factor=each.step_s / first.step_s,
            exact=is_exact(_training(each)),
        )
        for each in front[:MOST_RUNGS]
    )


def _training(candidate: Candidate) -> TrainingRecipe:
    assert isinstance(candidate.recipe, TrainingRecipe)
    return candidate.recipe


def _levers(recipe: TrainingRecipe) -> dict[str, str | int]:
    levers = {lever: getattr(recipe, lever) for lever in LEVERS if lever != "selective_steps"}
    if recipe.selective_steps:
        levers["selective_steps"] = ",".join(recipe.selective_steps)
    return {
        "device_batch_size": recipe.device_batch_size,
        "grad_accum_steps": recipe.grad_accum_steps,
        "loss": recipe.loss,
        **levers,
    }


def _rejected(draft: Draft, choice: Choice, each: Candidate) -> Rejection:
    chosen, recipe = choice.recipe, _training(each)
    assert isinstance(chosen, TrainingRecipe)
    batch = f"device_batch_size {recipe.device_batch_size}"
    change = ", ".join([*difference(recipe, chosen), batch])
    factor = each.step_s / choice.step_s
    if each.process_bytes > draft.capacity_bytes:
        name, size = _largest(draft, recipe)
        because = (
            f"needs up to {gib(each.process_bytes)} of {gib(draft.capacity_bytes)};"
            f" largest: {name} {gib(size)}"
        )
    elif factor > 1 + TIE_SHARE:
        because = f"{factor:.2f} x the time, up to {gib(each.process_bytes)}"
    elif draft.asked.objective == "memory":
        because = f"up to {gib(each.process_bytes)} for {factor:.2f} x the time"
    elif each.process_bytes > choice.memory.process_bytes.high:
        because = f"no faster, needs up to {gib(each.process_bytes)}"
    else:
        because = "does not fit once the allocator is simulated"
    return Rejection(change=change, because=because)


def _largest(draft: Draft, recipe: TrainingRecipe) -> tuple[str, int]:
    """The category that fills most of a recipe's peak, with its bytes."""
    machine = draft.machine
    runtime = runtime_of(draft.shape, recipe, machine.gpu, machine.num_threads)
    timeline, batch = timeline_of(draft.shape, recipe, runtime), batch_of(recipe)
    sizes: dict[str, int] = {}
    for buffer, number in timeline.read(batch)[0].buffers.items():
        size = number * timeline.bytes_of(buffer, batch)
        sizes[buffer.category] = sizes.get(buffer.category, 0) + size
    return max(sizes.items(), key=lambda item: item[1])

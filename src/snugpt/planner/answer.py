"""The one entry of the planner: from a Question to a Plan."""

from __future__ import annotations

from itertools import islice
from typing import Any

import msgspec

from snugpt.errors import BadQuestionError
from snugpt.estimate.host import GPU_HOST_BYTES, host_bytes
from snugpt.estimate.memory import batch_of, runtime_of, timeline_of
from snugpt.estimate.speed import speed_estimate
from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.planner.command import command_line, started_by
from snugpt.planner.draft import MOST_EPOCHS, Draft, draft
from snugpt.planner.explain import ladder, rejections, training_reasons
from snugpt.planner.generating import largest_batch
from snugpt.planner.horizon import CorpusSize, automatic_batch_tokens, corpus_tokens
from snugpt.planner.machine import CPU_ID, Machine, machine_for, share_of_each
from snugpt.planner.programs import cautions, num_gpus_of, run_command, what_could_be_had_back
from snugpt.planner.search import Choice, choose
from snugpt.planner.subject import SHORTEST_CONTEXT
from snugpt.spec.catalogue import card
from snugpt.spec.plan import (
    Alternative,
    DataEstimate,
    HostEstimate,
    Parameters,
    Plan,
    SpeedEstimate,
)
from snugpt.spec.question import ALIASES, Question
from snugpt.spec.recipe import GenerationRecipe, TrainingRecipe
from snugpt.units import gib, plural

KEPT_CHECKPOINTS = 2
SHARDS = 2  # our own: one file of tokens to train on, one to validate
MOST_ALTERNATIVES = 3
DEFAULT_WHEELS = "default wheels"


def plan(*, corpus: CorpusSize | None = None, **fields: Any) -> Plan:
    """Return the plan for a Question's fields: `plan(gpu="rtx-4090", depth=12)`.

    Fields are the flags of `snugpt plan`, with underscores; `reserve` is in bytes here.

    `corpus` is the length of the text named by `input`, where that is known.

    Raises:
        BadQuestionError: a field is unknown, of another type, or out of range.
    """
    return answer(question_of(fields), corpus=corpus)


def question_of(fields: dict[str, Any]) -> Question:
    """Return a checked Question from fields by name.

    Raises:
        BadQuestionError: a field is unknown, of another type, or out of range.
    """
    from snugpt.spec.config_file import checked_question

    return checked_question(
        {ALIASES.get(name, name): value for name, value in fields.items()}, where="plan"
    )


def answer(
    question: Question,
    *,
    machine: Machine | None = None,
    corpus: CorpusSize | None = None,
    num_alternatives: int = MOST_ALTERNATIVES,
) -> Plan:
    """Return the plan: what was chosen, why, what else there is; `fits` says if it fits.

    `machine` is the one to plan for where it is known already, else the question's `gpu` or this
    machine. The same question, machine and corpus give the same plan. Each alternative is a search
    and a simulation of its own; `num_alternatives` says how many are wanted at most.

    Raises:
        BadQuestionError: the question can't be answered as asked.
    """
    machine = machine or machine_for(question.gpu)
    asked = question
    try:
        asked = _named(question, machine)
        made = draft(asked, share_of_each(machine, num_gpus_of(asked)), corpus)
        choice = choose(made.found, made.asked, made.shape, made.machine)
    except BadQuestionError as error:
        from snugpt.planner.mending import with_working_hint

        raise with_working_hint(error, asked, machine, corpus) from None
    training = isinstance(choice.recipe, TrainingRecipe)
    stack = find_stack(asked.stack)
    groups: dict[str, int] = {str(k): n for k, n in stack.parameter_groups(made.shape).items()}
    return Plan(
        fits=choice.memory.fits,
        question=_kept(made),
        stack=stack.name,
        command=_command(made, choice),
        gpu=made.machine.gpu,
        shape=made.shape,
        parameters=Parameters(total=sum(groups.values()), groups=groups),
        recipe=choice.recipe,
        reasons=training_reasons(made, choice) if training else _generation_reasons(made),
        memory=choice.memory,
        speed=_speed(made, choice),
        data=_data(made) if training else None,
        host=_host(made, choice),
        alternatives=_alternatives(made, choice, num_alternatives),
        rejected=rejections(made, choice) if training else (),
        ladder=ladder(made) if training else (),
        notes=_notes(made, choice),
    )


def _named(question: Question, machine: Machine) -> Question:
    """The question with its card's id and its stack's version, so that its command says the same
    on any machine and any day."""
    named = msgspec.structs.replace(question, stack=find_stack(question.stack).name)
    known = machine.gpu.id == CPU_ID or card(machine.gpu.id) is not None
    return msgspec.structs.replace(named, gpu=machine.gpu.id) if known else named


def _command(made: Draft, choice: Choice) -> str:
    """What runs it: our own command, or that of another stack's program."""
    recipe = choice.recipe
    if isinstance(recipe, GenerationRecipe):
        return command_line(made.asked)
    if find_stack(made.asked.stack).version is None:
        line = command_line(made.asked)
        alone = recipe.world_size == 1
        train = f"{started_by(recipe.world_size)} train"
        return line if alone else line.replace("snugpt plan", train, 1)
    automatic = automatic_batch_tokens(made.asked, made.shape)
    return run_command(made.asked, made.shape, recipe, automatic)


def _kept(made: Draft) -> Question:
    """The question as it was said; a run must know that its tokens are bytes."""
    if made.question.byte_tokens:
        return msgspec.structs.replace(made.asked, byte_tokens=True, vocab_size=None)
    return made.asked


def _speed(made: Draft, choice: Choice) -> SpeedEstimate:
    machine = made.machine
    return speed_estimate(
        made.shape,
        choice.recipe,
        machine.gpu,
        measured_flops_per_s=machine.measured_flops_per_s,
    )


def _generation_reasons(made: Draft) -> dict[str, str]:
    (only,) = made.found
    assert isinstance(only.recipe, GenerationRecipe)
    reasons = {}
    if made.asked.weight_dtype is None:
        has = "has" if only.recipe.weight_dtype == "bf16" else "has no"
        reasons["weight_dtype"] = f"{made.machine.gpu.name} {has} bf16"
    for field in ("batch", "prompt_tokens", "max_new_tokens"):
        if getattr(made.asked, field) is None:
            reasons[field] = "default"
    return reasons


def _data(made: Draft) -> DataEstimate:
    tokens = made.tokens.tokens
    if made.corpus is None:
        return DataEstimate(tokens=tokens)
    return DataEstimate(
        tokens=tokens,
        characters=made.corpus.num_characters,
        shards=SHARDS,
        epochs=tokens / corpus_tokens(made.question, made.corpus),
    )


def _host(made: Draft, choice: Choice) -> HostEstimate:
    """RAM, disk and one checkpoint: weights as they are trained, the optimizer's state beside."""
    recipe, machine = choice.recipe, made.machine
    runtime = runtime_of(made.shape, recipe, machine.gpu, machine.num_threads)
    timeline = timeline_of(made.shape, recipe, runtime)
    resident, stages = timeline.resident, "optimizer stages"
    state = sum(
        b.fixed_bytes
        for b in (*resident, *timeline.host)
        if b.category == "optimizer" and b.name != stages
    )
    stored = 2 if isinstance(recipe, TrainingRecipe) and recipe.weight_dtype == "bf16" else 4
    weights = sum(find_stack(made.asked.stack).parameter_groups(made.shape).values()) * stored
    ranks = 1
    if isinstance(recipe, TrainingRecipe) and recipe.stack != "snugpt":
        ranks = recipe.world_size  # each writes its share of the state
        weights = sum(b.fixed_bytes for b in resident if b.name.startswith("weights: "))
    checkpoint_bytes = weights + ranks * state
    if isinstance(recipe, TrainingRecipe) and recipe.stack == "snugpt" and recipe.world_size > 1:
        gathered = msgspec.structs.replace(recipe, sharding="none")
        alone = timeline_of(made.shape, gathered, runtime).resident
        checkpoint_bytes = weights + sum(b.fixed_bytes for b in alone if b.category == "optimizer")
    disk = checkpoint_bytes
    if isinstance(recipe, TrainingRecipe):
        disk *= KEPT_CHECKPOINTS if recipe.stack == "snugpt" else 1  # nanochat keeps its last
        if made.corpus is not None:
            width = 2 if made.shape.vocab_size <= 1 << 16 else 4
            disk += width * corpus_tokens(made.question, made.corpus)
    on_cpu = machine.gpu.backend == "cpu"
    pinned = host_bytes(timeline, batch_of(recipe))
    ram = choice.memory.process_bytes.high if on_cpu else ranks * GPU_HOST_BYTES + pinned
    return HostEstimate(ram_bytes=ram, disk_bytes=disk, checkpoint_bytes=checkpoint_bytes)


def _alternatives(made: Draft, choice: Choice, most: int) -> tuple[Alternative, ...]:
    if not choice.memory.fits:
        from snugpt.planner.nearest import nearest  # spares the import where all is well

        steps = islice(nearest(made), max(2, most))
        return tuple(_alternative(change, other, fit) for change, other, fit in steps)
    if isinstance(choice.recipe, GenerationRecipe):
        return ()
    found = []
    keep = {"depth": made.question.depth} if made.depth_rule is not None else {}
    for change, fields in _variations(made, choice.recipe)[:most]:
        try:
            other = draft(
                msgspec.structs.replace(made.asked, **keep, **fields), made.machine, made.corpus
            )
        except BadQuestionError:  # half a context may not divide a pinned total
            continue
        if other.fitting:
            fit = choose(other.found, other.asked, other.shape, other.machine)
            found += [_alternative(change, other, fit)] if fit.memory.fits else []
    return tuple(found)


def _variations(made: Draft, recipe: TrainingRecipe) -> list[tuple[str, dict[str, Any]]]:
    """Other plans worth a look: the other way to checkpoint, half the context."""
    found: list[tuple[str, dict[str, Any]]] = []
    if made.asked.checkpoint is None:
        other = "none" if recipe.checkpoint == "blocks" else "blocks"
        found.append((f"checkpoint {other}", {"checkpoint": other}))
    half = recipe.seq_len // 2
    if made.asked.seq_len is None and half >= SHORTEST_CONTEXT:
        found.append((f"seq_len {half}", {"seq_len": half}))
    return found


def _alternative(change: str, other: Draft, choice: Choice) -> Alternative:
    return Alternative(
        change=change,
        recipe=choice.recipe,
        memory=choice.memory,
        speed=_speed(other, choice),
        command=command_line(other.asked),
    )


def _smaller_batch(made: Draft, choice: Choice) -> list[str]:
    """What the next smaller batch on a card would give back."""
    recipe = choice.recipe
    assert isinstance(recipe, TrainingRecipe)
    for each in made.found:
        other = each.recipe
        assert isinstance(other, TrainingRecipe)
        if other.device_batch_size < recipe.device_batch_size:
            bytes_ = [candidate.process_bytes for candidate in made.found
                      if candidate.recipe == recipe]  # fmt: skip
            saved, slower = bytes_[0] - each.process_bytes, each.step_s / choice.step_s
            return [
                f"device_batch_size {other.device_batch_size} would save {gib(saved)} for"
                f" {slower:.2f} x the time"
            ]
    return []


def _notes(made: Draft, choice: Choice) -> tuple[str, ...]:
    machine, gpu = made.machine, made.machine.gpu
    notes: list[str] = []
    if find_stack(made.asked.stack).version is not None:
        assert isinstance(choice.recipe, TrainingRecipe)
        notes += what_could_be_had_back(choice.recipe, choice.memory, made.asked)
        notes += _smaller_batch(made, choice)
        notes += cautions(made.asked, made.shape, gpu)
    if gpu.pytorch and not gpu.pytorch.startswith(DEFAULT_WHEELS):
        notes.append(f"PyTorch for {gpu.name}: {gpu.pytorch}")
    if gpu.backend == "mps":
        notes.append("Apple GPUs are untested: predicted by CUDA's rules without flash attention")
    if gpu.backend == "cuda":
        notes.append("predicted; there is no record from a GPU yet")
        if isinstance(choice.recipe, TrainingRecipe) and choice.recipe.compile == "on":
            notes.append("compiled layers are predicted from the plan that PyTorch 2.13 makes")
        taken = gpu.usable_bytes - machine.capacity_bytes
        if taken > 0:
            notes.append(f"{gib(taken)} of the card are in use by others now")
    if "usable_bytes" in gpu.recalled:
        notes.append(f"the memory of {gpu.name} is recalled, not read from a source")
    if made.corpus is not None:
        epochs = made.tokens.tokens / corpus_tokens(made.question, made.corpus)
        if epochs > MOST_EPOCHS:
            notes.append(
                f"the text is read about {epochs:.0f} times;"
                f" past {MOST_EPOCHS:g} repeats teach little"
            )
    if isinstance(choice.recipe, GenerationRecipe) and choice.memory.fits:
        largest = largest_batch(choice.recipe, made.asked, made.shape, machine)
        notes.append(f"up to {plural(largest, 'sequence')} of these lengths fit at once")
    return tuple(notes)

"""Where a question does not fit: the nearest ones that do, the smallest step away first.

pinned levers released -> half the context -> a smaller preset -> fewer layers -> the plain dial
-> no reserve -> a larger card
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import msgspec

from snugpt.errors import BadQuestionError
from snugpt.estimate.parameters import num_parameters
from snugpt.planner.command import plain_dial
from snugpt.planner.draft import Draft, draft
from snugpt.planner.machine import Machine
from snugpt.planner.search import Choice, choose
from snugpt.planner.subject import SHORTEST_CONTEXT, dial_of, seq_len_of, settled, shape_of
from snugpt.spec.catalogue import catalogue
from snugpt.spec.presets import presets
from snugpt.spec.question import Question
from snugpt.units import gib

Step = tuple[str, Draft]
MOST_SIMULATIONS = 6  # of one kind of change
PARAMETER_BYTES = 2  # at least, whatever the levers: a weight in 16 bits
BF16_SHARE = 0.5  # at least what bf16 leaves of the bytes, on a card that has it
LEVERS = ("device_batch_size", "grad_accum_steps", "checkpoint", "selective_steps", "compile",
          "loss", "loss_chunk_tokens", "compute_dtype", "state_dtype", "offload", "exact", "batch",
          "weight_dtype")  # fmt: skip


def nearest(stuck: Draft) -> Iterator[tuple[str, Draft, Choice]]:
    """Yield what fits by its whole estimate, one of each kind of change, the mildest kind first.

    The plain dial and giving up the reserve are for when nothing milder helps.
    """
    mild = (_released, _shorter, _smaller_preset, _shallower)
    found = [each for kind in mild if (each := _first_that_fits(kind(stuck)))]
    if not found:
        last = (_plain_dial, _without_reserve)
        found = [each for kind in last if (each := _first_that_fits(kind(stuck)))][:1]
    yield from found
    larger = _first_that_fits(_larger_card(stuck))
    if larger is not None:
        yield larger


def _first_that_fits(steps: Iterator[Step]) -> tuple[str, Draft, Choice] | None:
    """The first step that the simulation confirms, of the first few."""
    for change, tried in islice(steps, MOST_SIMULATIONS):
        choice = choose(tried.found, tried.asked, tried.shape, tried.machine)
        if choice.memory.fits:
            return change, tried, choice
    return None


def _try(stuck: Draft, question: Question, machine: Machine | None = None) -> Draft | None:
    """The draft of another question if that fits; None where it does not or can't be asked."""
    machine = machine or stuck.machine
    try:
        if _least_bytes(stuck, question) > machine.capacity_bytes - question.reserve:
            return None
        tried = draft(question, machine, stuck.corpus)
    except BadQuestionError:
        return None
    return tried if tried.fitting else None


def _least_bytes(stuck: Draft, question: Question) -> int:
    """What the parameters alone take: spares the walk of what is far too large."""
    definite = settled(question)
    depth = dial_of(definite)
    if depth is None:
        return 0
    shape = shape_of(definite, depth, stuck.corpus.num_bytes if stuck.corpus else None)
    return PARAMETER_BYTES * num_parameters(shape)


def _changed(question: Question, **changes: Any) -> Question:
    return msgspec.structs.replace(question, **changes)


def _pinned_levers(question: Question) -> list[str]:
    return [name for name in LEVERS if getattr(question, name) is not None]


def _freed(question: Question) -> Question:
    return _changed(question, **dict.fromkeys(_pinned_levers(question)))


def _released(stuck: Draft) -> Iterator[Step]:
    pinned = _pinned_levers(stuck.asked)
    sets = [[name] for name in pinned] + ([pinned] if len(pinned) > 1 else [])
    for names in sets:
        tried = _try(stuck, _changed(stuck.asked, **dict.fromkeys(names)))
        if tried is not None:
            yield "without the pinned " + ", ".join(names), tried


def _shorter(stuck: Draft) -> Iterator[Step]:
    """Half the context and half again; for generation fewer tokens in front and behind."""
    if stuck.asked.task == "generate":
        yield from _fewer_tokens(stuck)
        return
    if stuck.asked.seq_len is not None:
        return
    seq_len = seq_len_of(stuck.question) // 2
    while seq_len >= SHORTEST_CONTEXT:
        tried = _try(stuck, _changed(_freed(stuck.asked), seq_len=seq_len))
        if tried is not None:
            yield f"seq_len {seq_len}", tried
        seq_len //= 2


def _fewer_tokens(stuck: Draft) -> Iterator[Step]:
    asked = _freed(stuck.asked)
    for tokens in (128, 16, 1):
        changes = {
            name: tokens
            for name in ("prompt_tokens", "max_new_tokens")
            if getattr(asked, name) is None
        }
        tried = _try(stuck, _changed(asked, **changes)) if changes else None
        if tried is not None:
            yield ", ".join(f"{name} {tokens}" for name in changes), tried


def _smaller_preset(stuck: Draft) -> Iterator[Step]:
    """The largest preset of the table that has fewer parameters than the one asked for."""
    if stuck.asked.preset is None or "layers" not in presets().get(stuck.asked.preset, {}):
        return
    sizes = {}
    for name, fields in presets().items():
        if "layers" in fields:
            question = settled(_changed(stuck.asked, preset=name))
            sizes[name] = num_parameters(shape_of(question, question.layers or 1, None))
    own = num_parameters(stuck.shape)
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if sizes[name] < own:
            tried = _try(stuck, _changed(_freed(stuck.asked), preset=name))
            if tried is not None:
                yield f"preset {name}", tried


def _shallower(stuck: Draft) -> Iterator[Step]:
    """The most layers that fit; the dial turns the width with them unless it is pinned."""
    if stuck.asked.model is not None:
        return
    field = "layers" if stuck.asked.layers is not None else "depth"
    asked = _freed(stuck.asked)

    def at(number: int) -> Draft | None:
        return _try(stuck, _changed(asked, **{field: number}))

    for number, tried in _from_the_largest(stuck.shape.num_layers - 1, at):
        yield f"{field} {number}", tried


def _plain_dial(stuck: Draft) -> Iterator[Step]:
    """The dial with nothing pinned but the machine and the text."""

    def at(depth: int) -> Draft | None:
        return _try(stuck, plain_dial(stuck.asked, depth=depth))

    for depth, tried in _from_the_largest(stuck.shape.num_layers, at):
        yield f"depth {depth} and nothing else pinned", tried


def _from_the_largest(
    highest: int, at: Callable[[int], Draft | None]
) -> Iterator[tuple[int, Draft]]:
    """Yield the drafts that fit, from the largest number down; bytes rise with the number."""
    low = 0
    while low < highest:
        middle = (low + highest + 1) // 2
        if at(middle) is None:
            highest = middle - 1
        else:
            low = middle
    for number in range(low, 0, -1):
        tried = at(number)
        if tried is not None:
            yield number, tried


def _without_reserve(stuck: Draft) -> Iterator[Step]:
    if not stuck.asked.reserve:
        return
    tried = _try(stuck, _changed(stuck.asked, reserve=0))
    if tried is not None:
        yield f"without {gib(stuck.asked.reserve)} of reserve", tried


def _larger_card(stuck: Draft) -> Iterator[Step]:
    """The smallest card of the catalogue that holds the question as it was asked."""
    least = max(stuck.capacity_bytes, BF16_SHARE * stuck.best.process_bytes)
    cards = sorted(catalogue().values(), key=lambda card: card.usable_bytes)
    for card in cards:
        if card.backend == "cuda" and card.usable_bytes > least:
            machine = Machine(gpu=card, capacity_bytes=card.usable_bytes)
            tried = _try(stuck, _changed(stuck.asked, gpu=card.id), machine)
            if tried is not None:
                yield f"on the {card.name}", tried

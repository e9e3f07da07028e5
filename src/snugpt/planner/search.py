"""The search: sets of levers with their step time and their bytes, and the best that fits.

A shape is walked once per set of levers; each batch size is then arithmetic. Only what is chosen is
simulated and printed. Should the simulation disagree, the next best is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from snugpt.estimate.levers import Objection, why_not
from snugpt.estimate.memory import (
    batch_of,
    memory_estimate,
    peak_bytes,
    runtime_of,
    timeline_of,
)
from snugpt.estimate.parameters import num_parameters
from snugpt.estimate.process import highest_process_bytes
from snugpt.estimate.speed import step_time_s, training_rate
from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.planner.command import plain_dial, refused
from snugpt.planner.horizon import Amount
from snugpt.planner.levers import LeverSet, Tier, loses_nothing, tiers
from snugpt.planner.machine import Machine
from snugpt.planner.programs import launcher_of, num_gpus_of
from snugpt.planner.schedule import schedule_for
from snugpt.planner.subject import seq_len_of
from snugpt.spec.memory import MemoryEstimate
from snugpt.spec.question import Objective, Question
from snugpt.spec.recipe import ComputeDtype, Recipe, TrainingRecipe
from snugpt.spec.runtime import FIRST_BF16
from snugpt.spec.shape import ModelShape
from snugpt.units import GIB, MIB

CHUNK_BYTES = 128 * MIB  # fp32 logits of one chunk of the loss
SMALLEST_CHUNK_TOKENS = 64
TIE_SHARE = 0.001  # step times nearer than this are equal: the estimate is not that sharp
LARGEST_ESTIMATE_BYTES = 2**55
GRADIENT_BYTES = 4  # of a parameter, at most
NEAREST_SMALLEST = 3  # what the allocator adds may turn the order of the smallest


class Candidate(NamedTuple):
    """One set of levers: its recipe, the process bytes it may come to, the seconds of a step."""

    recipe: Recipe
    process_bytes: int
    step_s: float


class Choice(NamedTuple):
    """What was chosen, with its whole estimate."""

    recipe: Recipe
    memory: MemoryEstimate
    step_s: float


def compute_dtype(question: Question, machine: Machine) -> ComputeDtype:
    """Return the dtype of the arithmetic, or what is pinned.

    bf16 on CUDA 8.0 and up, fp16 on one older card, fp32 on everything else: several would have to
    agree on the scale of the loss.

    Raises:
        BadQuestionError: bf16 is pinned and the device has none, or generation in fp16 off CUDA.
    """
    pinned = question.compute_dtype if question.task == "train" else question.weight_dtype
    if pinned == "master":
        raise refused(
            "weight_dtype = 'master' is not allowed: generation has fp32, bf16 and fp16",
            question,
            weight_dtype=None,
        )
    capability = machine.gpu.capability
    if capability is not None and capability >= FIRST_BF16:
        return pinned or "bf16"
    several = question.task == "train" and num_gpus_of(question) > 1
    best: ComputeDtype = "fp32" if capability is None or several else "fp16"
    field = "compute_dtype" if question.task == "train" else "weight_dtype"
    if pinned == "bf16":
        raise refused(
            f"{field} = 'bf16' is not allowed: {machine.gpu.name} has no bf16, CUDA capability 8.0"
            " and up have",
            question,
            **{field: best},
        )
    if pinned == "fp16" and capability is None:
        raise refused(f"{field} = 'fp16' is not allowed: it is for CUDA", question, **{field: best})
    return pinned or best


def loss_chunk_tokens(question: Question, shape: ModelShape, seq_len: int) -> int:
    """Return the tokens of one chunk of the loss: the power of two whose logits take 128 MiB.

    At most one sequence, at least 64 tokens. Vocabulary 32768, fp32: 1024 tokens.
    """
    if question.loss_chunk_tokens is not None:
        return question.loss_chunk_tokens
    highest = min(CHUNK_BYTES // (4 * shape.padded_vocab_size), seq_len)
    return max(SMALLEST_CHUNK_TOKENS, 1 << max(0, highest.bit_length() - 1))


def candidates(
    question: Question, shape: ModelShape, machine: Machine, batch: Amount, tokens: Amount
) -> tuple[Candidate, ...]:
    """Return the sets of levers of a settled question, the largest batch first.

    Tier by tier, until something of a tier fits; for the smallest peak, all that is exact.

    Raises:
        BadQuestionError: a lever is pinned where it can't be pulled.
    """
    base = _base_recipe(question, shape, machine, batch.tokens, tokens.tokens)
    search = _Search(question, shape, machine, base)
    smallest, fits = question.objective == "memory", False
    for number, tier in enumerate(tiers(question, shape)):
        if fits and not (smallest and loses_nothing(tier, question)):
            break
        if search.smallest_fits(tier):
            search.look_at(tier, everything=number == 0 or smallest)
            fits = True
    if not search.found:
        search.look_at(tier, everything=True)
    if not search.found:
        why = search.objection
        assert why is not None
        raise refused(
            f"{why.lever} = {why.value!r} is not allowed: {why.because}", question, **why.mend
        )
    return tuple(search.found)


class _Search:
    """The candidates found so far, and what stood against the others."""

    def __init__(
        self, question: Question, shape: ModelShape, machine: Machine, base: TrainingRecipe
    ) -> None:
        self.shape, self.machine, self.base = shape, machine, base
        self.capacity_bytes = machine.capacity_bytes - question.reserve
        measured = machine.measured_flops_per_s
        self.rate = training_rate(machine.gpu, base, measured).flops_per_s.expected
        self.runtime = runtime_of(shape, base, machine.gpu, machine.num_threads)
        self.batches = list(_batches(question, base))
        self.weighed: dict[TrainingRecipe, Candidate] = {}
        self.objection: Objection | None = None

    @property
    def found(self) -> list[Candidate]:
        """The candidates, the largest batch first."""
        return sorted(self.weighed.values(), key=lambda each: -batch_of(each.recipe))

    def smallest_fits(self, tier: Tier) -> bool:
        """Whether the smallest batch fits with the sets of a tier that keep least."""
        batch, steps = self.batches[-1]
        least = [levers for levers in tier if levers["checkpoint"] == tier[-1]["checkpoint"]]
        for offload in dict.fromkeys(levers["offload"] for levers in least):
            sets = [levers for levers in least if levers["offload"] == offload]
            allowed = (self.recipe(levers, batch, steps) for levers in reversed(sets))
            smallest = next((recipe for recipe in allowed if recipe is not None), None)
            if smallest and self.weigh(smallest).process_bytes <= self.capacity_bytes:
                return True
        return False

    def look_at(self, tier: Tier, *, everything: bool) -> None:
        """Weigh the sets of a tier with every batch; or the fastest first, until one fits."""
        recipes = [
            recipe
            for levers in tier
            for batch, steps in self.batches
            if (recipe := self.recipe(levers, batch, steps)) is not None
        ]
        if everything:
            for recipe in recipes:
                if not self.is_hopeless(recipe):
                    self.weigh(recipe)
            return
        least_s = sorted(
            ((self.step_s(recipe, waits=False), i) for i, recipe in enumerate(recipes))
        )
        fastest_s = math.inf
        for at_least_s, i in least_s:
            if at_least_s > fastest_s * (1 + TIE_SHARE):
                return
            if not self.is_hopeless(recipes[i]):
                candidate = self.weigh(recipes[i])
                if candidate.process_bytes <= self.capacity_bytes:
                    fastest_s = min(fastest_s, candidate.step_s)

    def recipe(self, levers: LeverSet, batch: int, steps: int) -> TrainingRecipe | None:
        """The recipe with these levers, None where they can't be pulled together."""
        recipe = msgspec.structs.replace(
            self.base, **levers, device_batch_size=batch, grad_accum_steps=steps
        )
        if recipe.stack == "snugpt":
            objection = why_not(self.shape, recipe, self.runtime)
            if objection is not None:
                self.objection = self.objection or objection
                return None
        return recipe

    def weigh(self, recipe: TrainingRecipe) -> Candidate:
        """The recipe with its bytes and its time."""
        if recipe not in self.weighed:
            peak = peak_bytes(self.shape, recipe, self.runtime)
            process_bytes = highest_process_bytes(peak, self.runtime, recipe)
            self.weighed[recipe] = Candidate(recipe, process_bytes, self.step_s(recipe))
        return self.weighed[recipe]

    def step_s(self, recipe: TrainingRecipe, *, waits: bool = True) -> float:
        """Seconds of a step; without `waits` at least so many."""
        return step_time_s(self.shape, recipe, self.machine.gpu, self.rate, waits=waits)

    def is_hopeless(self, recipe: TrainingRecipe) -> bool:
        """Whether all of a step in one pass is so far from fitting that it needs no walk.

        One pass differs from several by the gradients at most, which it may let go of on the way.
        """
        if recipe.grad_accum_steps > 1 or len(self.batches) == 1:
            return False
        batch = recipe.device_batch_size
        several = msgspec.structs.replace(recipe, device_batch_size=1, grad_accum_steps=batch)
        timeline = timeline_of(self.shape, several, self.runtime)
        gradients = num_parameters(self.shape) * GRADIENT_BYTES
        return timeline.peak_bytes(batch) - gradients > self.capacity_bytes


def choose(
    found: tuple[Candidate, ...], question: Question, shape: ModelShape, machine: Machine
) -> Choice:
    """Return the best of `found` that fits by its whole estimate; else the smallest of them.

    Raises:
        BadQuestionError: even the smallest is beyond any machine.
    """
    capacity = machine.capacity_bytes - question.reserve
    fitting = [each for each in found if each.process_bytes <= capacity]
    simulated: list[Choice] = []
    while fitting:
        best = best_of(fitting, question.objective)
        memory = estimate(best.recipe, question, shape, machine)
        if memory.fits:
            simulated.append(Choice(best.recipe, memory, best.step_s))
            if question.objective == "speed" or len(simulated) == NEAREST_SMALLEST:
                break
        fitting.remove(best)
    if simulated:
        return min(simulated, key=lambda choice: choice.memory.process_bytes.high)
    smallest = min(found, key=lambda each: (each.process_bytes, each.step_s))
    if smallest.process_bytes > LARGEST_ESTIMATE_BYTES:
        plain = plain_dial(question, depth=12)
        raise refused(
            f"the model and one batch need {smallest.process_bytes / GIB:.3g} GiB,"
            " more than any machine",
            plain, **{field: getattr(plain, field) for field in plain.__struct_fields__},
        )  # fmt: skip
    memory = estimate(smallest.recipe, question, shape, machine)
    return Choice(smallest.recipe, memory, smallest.step_s)


def best_of(fitting: list[Candidate], objective: Objective) -> Candidate:
    """Return the fastest (of those within a thousandth the smallest), or the smallest."""
    if objective == "memory":
        return min(fitting, key=lambda each: (each.process_bytes, each.step_s))
    fastest = min(each.step_s for each in fitting)
    tied = [each for each in fitting if each.step_s <= fastest * (1 + TIE_SHARE)]
    return min(tied, key=lambda each: (each.process_bytes, each.step_s))


def estimate(
    recipe: Recipe, question: Question, shape: ModelShape, machine: Machine
) -> MemoryEstimate:
    """The whole estimate of a recipe on a machine, with the question's reserve."""
    return memory_estimate(
        shape,
        recipe,
        machine.gpu,
        num_threads=machine.num_threads,
        reserve_bytes=question.reserve,
        capacity_bytes=machine.capacity_bytes,
    )


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, largest first."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)}, reverse=True)


def _batches(question: Question, base: TrainingRecipe) -> Iterator[tuple[int, int]]:
    """Yield (device batch, accumulation), the largest batch first; what is pinned has one value."""
    rows = base.total_batch_tokens // base.seq_len // base.world_size
    if question.device_batch_size is not None:
        batches = [question.device_batch_size]
    elif question.grad_accum_steps is not None:
        batches = [rows // question.grad_accum_steps]
    else:
        batches = divisors(rows)
    for batch in batches:
        yield batch, rows // batch


def _base_recipe(
    question: Question, shape: ModelShape, machine: Machine, batch: int, tokens: int
) -> TrainingRecipe:
    """The recipe with every field that is not searched; its batch is one sequence."""
    seq_len = seq_len_of(question)
    if find_stack(question.stack).version is not None:
        return _nanochat_recipe(question, machine, seq_len, batch, tokens)
    optimizer = question.optimizer or "muon"
    schedule = schedule_for(
        question, shape, optimizer,
        num_steps=-(-tokens // batch), total_tokens=tokens, seq_len=seq_len,
    )  # fmt: skip
    return TrainingRecipe(
        seq_len=seq_len,
        device_batch_size=1,
        grad_accum_steps=batch // seq_len // num_gpus_of(question),
        world_size=num_gpus_of(question),
        total_batch_tokens=batch,
        total_tokens=tokens,
        compute_dtype=compute_dtype(question, machine),
        loss=question.loss or "chunked",
        loss_chunk_tokens=loss_chunk_tokens(question, shape, seq_len),
        checkpoint="none",
        compile=question.compile or "off",  # until a compiled step has run on a GPU
        optimizer=optimizer,
        sharding=question.sharding or "none",
        launcher=launcher_of(question),
        fp8="on" if question.fp8 else "off",
        schedule=schedule,
    )


def _nanochat_recipe(
    question: Question, machine: Machine, seq_len: int, batch: int, tokens: int
) -> TrainingRecipe:
    """What nanochat does of itself: it compiles, and never chunks or recomputes."""
    world_size = num_gpus_of(question)
    return TrainingRecipe(
        seq_len=seq_len,
        device_batch_size=1,
        grad_accum_steps=batch // seq_len // world_size,
        world_size=world_size,
        total_batch_tokens=batch,
        total_tokens=tokens,
        compute_dtype=compute_dtype(question, machine),
        loss="plain",
        loss_chunk_tokens=seq_len,
        checkpoint="none",
        optimizer="muon",
        fp8="on" if question.fp8 else "off",
        compile=question.compile or "on",
        sharding="optimizer" if world_size > 1 else "none",
        stack=find_stack(question.stack).name,
        launcher=launcher_of(question),
        schedule=None,
    )

"""How long to train and how many tokens one step takes: the rules, each with its name in words.

1) tokens        pinned, else tokens per parameter x the style's scaling parameters, else `--hours`
2) batch         pinned, else batch_size x seq_len, else nanochat's rule for the dial:
                 2^round(log2(2^19 x (D / D_d12)^0.383)), D the tokens of 1) by the ratio
                 (base_train.py, July 2026)
3) at least 200 steps: a batch that is not pinned shrinks to a 200th of the text or of the tokens
4) whole sequences: a batch that is not pinned is a power of two of them, one that is must divide
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from snugpt.errors import bad_value
from snugpt.estimate.parameters import scaling_parameters
from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.planner.command import refused
from snugpt.planner.programs import num_gpus_of
from snugpt.planner.subject import seq_len_of, shape_of
from snugpt.spec.question import RANGES, Question
from snugpt.spec.shape import ModelShape, Style, shape_for
from snugpt.units import count

TOKENS_PER_PARAM: dict[Style, float] = {"nanochat": 12.0, "llama": 20.0, "gpt2": 20.0}
SCALING_PARAMETERS: dict[Style, str] = {
    "nanochat": "matrices + head", "llama": "non-embedding parameters",
    "gpt2": "non-embedding parameters",
}  # fmt: skip
REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT = 0.383
FEWEST_STEPS = 200
BYTES_PER_BPE_TOKEN = 3.2  # of a vocabulary trained on the text; assumed until it is tokenized


class CorpusSize(msgspec.Struct, frozen=True, kw_only=True):
    """How long the text is that a run learns from: UTF-8 bytes and characters."""

    num_bytes: int
    num_characters: int


class Amount(NamedTuple):
    """Tokens, and the rule that says so."""

    tokens: int
    rule: str


def corpus_tokens(question: Question, corpus: CorpusSize) -> int:
    """Return about how many tokens the text is: one per byte, or one per 3.2 bytes of a BPE."""
    per_token = 1.0 if question.byte_tokens else BYTES_PER_BPE_TOKEN
    return max(1, int(corpus.num_bytes / per_token))


def target_tokens(question: Question, shape: ModelShape) -> Amount:
    """Return the tokens a shape should see by its ratio, whatever else is pinned."""
    ratio, pinned = question.tokens_per_param, question.tokens_per_param is not None
    stack = find_stack(question.stack)
    if stack.version is None:
        default = TOKENS_PER_PARAM[shape.style]
        parameters, kind = scaling_parameters(shape), SCALING_PARAMETERS[shape.style]
    else:
        groups = stack.parameter_groups(shape)
        default, kind = stack.version.ratio, stack.version.ratio_of
        scaling = groups["matrices"] + groups["head"]
        parameters = sum(groups.values()) if kind == "all parameters" else scaling
    ratio = default if ratio is None else ratio
    rule = f"{ratio:g} x {count(parameters)} {kind}"
    return Amount(max(1, round(ratio * parameters)), rule + (" (pinned ratio)" if pinned else ""))


def total_tokens(question: Question, shape: ModelShape, batch_tokens: int) -> Amount:
    """Return the tokens of the whole run; with `--hours` what it would be without them.

    Raises:
        BadQuestionError: more tokens than a count can hold.
    """
    if question.total_tokens is not None:
        return Amount(question.total_tokens, "pinned")
    if question.num_iterations is not None:
        amount = Amount(question.num_iterations * batch_tokens, "pinned number of steps")
    else:
        amount = target_tokens(question, shape)
        if (
            find_stack(question.stack).version is not None
        ):  # nanochat takes whole steps, rounded down
            whole = max(1, amount.tokens // batch_tokens) * batch_tokens
            amount = Amount(whole, amount.rule)
    highest = RANGES["total_tokens"][1]
    if amount.tokens > highest:
        raise bad_value("total_tokens", amount.tokens, f"at most {highest:g}")
    return amount


def tokens_in(hours: float, tokens_per_s: float, batch_tokens: int) -> Amount:
    """Return what the predicted speed gives in that time, in whole steps and at least one."""
    steps = max(1, int(hours * 3600.0 * tokens_per_s / batch_tokens))
    highest = int(RANGES["total_tokens"][1])
    return Amount(min(steps * batch_tokens, highest), f"what {hours:g} h give at that speed")


def most_tokens(asked: Question, question: Question, corpus: CorpusSize | None) -> int | None:
    """Return the tokens a run can be expected to read, None where nothing bounds a batch.

    A batch that was said, by `batch_size` or through the number of steps, is left as it is; one
    that only a preset brings to the settled `question` is not.
    """
    if asked.batch_size is not None or asked.num_iterations is not None:
        return None
    if find_stack(asked.stack).version is not None:  # its batch is its own rule's
        return None
    bounds = [asked.total_tokens] if asked.total_tokens is not None else []
    if corpus is not None:
        bounds.append(corpus_tokens(question, corpus))
    return min(bounds, default=None)


def batch_tokens(question: Question, shape: ModelShape, most: int | None = None) -> Amount:
    """Return the tokens of one optimizer step of a settled question.

    A batch that is not pinned leaves 200 steps where the run reads `most` tokens.

    Raises:
        BadQuestionError: a pinned total does not divide by the sequences it is made of.
    """
    seq_len = seq_len_of(question)
    unit = seq_len * (question.device_batch_size or 1) * (question.grad_accum_steps or 1)
    unit *= num_gpus_of(question)
    if question.total_batch_tokens is not None:
        return _pinned_batch(question, question.total_batch_tokens, unit)
    if question.device_batch_size and question.grad_accum_steps:
        return _within_limit(Amount(unit, "pinned batch x accumulation x context"))
    if question.batch_size is not None:
        amount = Amount(question.batch_size * seq_len, f"{question.batch_size} x {seq_len} tokens")
    else:
        amount = _dial_rule(question, shape)
    if most is not None and most // FEWEST_STEPS < amount.tokens:
        rows = _sequences(most // FEWEST_STEPS // seq_len)
        capped = Amount(rows * seq_len, f"{amount.rule}, capped to leave {FEWEST_STEPS} steps")
        amount = min(amount, capped)
    return _within_limit(_whole(amount, unit))


def refuse_uneven_batch(asked: Question) -> None:
    """Refuse a batch_size that was said and does not divide into the parts that were said.

    Raises:
        BadQuestionError: with the nearest batch_size that does.
    """
    batch, device, steps = asked.batch_size, asked.device_batch_size, asked.grad_accum_steps
    unit = (device or 1) * (steps or 1) * num_gpus_of(asked)
    if batch is None or (batch == unit if device and steps else batch % unit == 0):
        return
    nearest = unit if device and steps else max(unit, batch // unit * unit)
    parts = {"device_batch_size": device, "grad_accum_steps": steps, "num_gpus": asked.num_gpus}
    product = " x ".join(f"{name} {value}" for name, value in parts.items() if value)
    raise refused(
        f"batch_size = {batch} does not divide by {product}; nearest: {nearest}",
        asked,
        batch_size=nearest,
    )


def _dial_rule(question: Question, shape: ModelShape) -> Amount:
    """nanochat's batch for a number of tokens, against depth 12 of the same vocabulary."""
    version = find_stack(question.stack).version
    if version is not None and version.total_batch_tokens is not None:
        rule, tokens = f"default of {version.name}", version.total_batch_tokens
    else:
        seen = target_tokens(question, shape).tokens
        rule, tokens = f"nanochat's rule for {count(seen)} tokens", _rule_tokens(question, shape)
    seq_len = seq_len_of(question)
    return Amount(_sequences(tokens // seq_len) * seq_len, rule)


def automatic_batch_tokens(question: Question, shape: ModelShape) -> int:
    """Return what a version of nanochat takes for its total batch if nobody says."""
    version = find_stack(question.stack).version
    assert version is not None
    return version.total_batch_tokens or _rule_tokens(question, shape)


def _rule_tokens(question: Question, shape: ModelShape) -> int:
    if find_stack(question.stack).version is None:
        twelve = shape_for(shape.style, REFERENCE_DEPTH, vocab_size=shape.vocab_size)
    else:
        twelve = shape_of(question, REFERENCE_DEPTH, None)
    share = target_tokens(question, shape).tokens / target_tokens(question, twelve).tokens
    exponent = round(math.log2(REFERENCE_BATCH_TOKENS * share**BATCH_EXPONENT))
    return 1 << exponent


def _sequences(number: int) -> int:
    """The largest power of two not above `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def _whole(amount: Amount, unit: int) -> Amount:
    """Round a batch that was not pinned down to what its pinned parts divide."""
    return Amount(max(unit, amount.tokens // unit * unit), amount.rule)


def _pinned_batch(question: Question, tokens: int, unit: int) -> Amount:
    if question.device_batch_size and question.grad_accum_steps:
        wrong = tokens != unit
        nearest = [unit]
    else:
        wrong = tokens % unit > 0
        below = tokens // unit * unit
        nearest = [n for n in (below, below + unit) if n]
    if not wrong:
        return Amount(tokens, "pinned")
    parts = {"seq_len": seq_len_of(question), "device_batch_size": question.device_batch_size,
             "grad_accum_steps": question.grad_accum_steps,
             "num_gpus": question.num_gpus}  # fmt: skip
    product = " x ".join(f"{name} {value}" for name, value in parts.items() if value)
    raise refused(
        f"total_batch_tokens = {tokens} does not divide by {product};"
        f" nearest: {' and '.join(map(str, nearest))}",
        question,
        total_batch_tokens=nearest[0],
    )


def _within_limit(amount: Amount) -> Amount:
    highest = int(RANGES["total_batch_tokens"][1])
    if amount.tokens > highest:
        raise bad_value("total_batch_tokens", amount.tokens, f"at most {highest}")
    return amount

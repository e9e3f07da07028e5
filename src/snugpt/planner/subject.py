"""What a question is about, made definite: its preset laid under it, its model's shape.

Above all else stands what was said; a preset fills what was not, the dial the rest.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from snugpt.errors import unknown_name
from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.estimate.stacks.nanochat.parameters import shape_of as nanochat_shape
from snugpt.planner.command import refused
from snugpt.planner.programs import refuse_what_the_stack_lacks
from snugpt.spec.plan import read_plan
from snugpt.spec.question import (
    GENERATION_ONLY,
    RIVALS,
    TRAINING_ONLY,
    Question,
    overlay,
    said_fields,
)
from snugpt.spec.shape import HEAD_DIM, ModelShape, Style, default_vocab_size, shape_for
from snugpt.units import round_up

RUNS = Path("runs")
BYTE_VALUES = 256
SHORTEST_CONTEXT = 128  # no shorter one is proposed
CONTEXT_LEN: dict[Style, int] = {"nanochat": 2048, "llama": 2048, "gpt2": 1024}
_SHAPE_FIELDS = (
    *("style", "depth", "preset", "layers", "width", "heads", "kv_heads", "mlp", "vocab_size"),
    *("tie", "dropout", "window_pattern", "byte_tokens", "seq_len"),
)


def settled(question: Question) -> Question:
    """Return the question with its preset's fields where it says nothing itself.

    A preset's vocabulary gives way to the rule for a tokenizer that is trained on the user's text.

    Raises:
        BadQuestionError: there is no such preset, or two fields contradict each other.
    """
    said = said_fields(question)
    refuse_what_the_stack_lacks(question, said)
    _refuse_contradictions(question, said)
    if question.preset is not None:
        from snugpt.spec.presets import preset_fields  # spares the import where there is none

        lower = dict(preset_fields(question.preset))
        if question.input is not None:
            lower.pop("vocab_size", None)
        if question.task == "generate":
            lower = {field: lower[field] for field in lower if field not in TRAINING_ONLY}
        question = Question(**overlay(said, lower))
    if question.vocab_size == BYTE_VALUES and question.byte_tokens is None:
        question = msgspec.structs.replace(question, byte_tokens=True)
    if question.byte_tokens and question.vocab_size not in (None, BYTE_VALUES):
        raise refused(
            f"vocab_size = {question.vocab_size} is not allowed: {BYTE_VALUES}, one token per byte"
            " value",
            question, vocab_size=None,
        )  # fmt: skip
    return question


def dial_of(question: Question) -> int | None:
    """Return the depth a settled question stands at; None leaves it to the planner."""
    if question.depth is not None or question.layers is not None:
        return question.depth or question.layers
    return None if question.width is None else max(1, round(question.width / 64))


def style_of(question: Question) -> Style:
    """Return the style of model: nanochat unless something else is said."""
    return question.style or "nanochat"


def seq_len_of(question: Question) -> int:
    """Return the tokens of one sequence, which is the context too."""
    return question.seq_len or CONTEXT_LEN[style_of(question)]


def vocab_size_of(question: Question, corpus_bytes: int | None) -> int:
    """Return the entries of the vocabulary: said, bytes, or what suits that much text."""
    if question.byte_tokens:
        return BYTE_VALUES
    return question.vocab_size or default_vocab_size(style_of(question), corpus_bytes)


def shape_of(question: Question, depth: int, corpus_bytes: int | None) -> ModelShape:
    """Return the shape of a settled question at `depth` of the dial, with its pinned fields.

    Raises:
        BadQuestionError: a field is out of range or the heads do not divide the width.
    """
    version = find_stack(question.stack).version
    if version is not None:
        return nanochat_shape(
            version, depth, seq_len=seq_len_of(question), vocab_size=question.vocab_size,
            window_pattern=question.window_pattern,
        )  # fmt: skip
    style = style_of(question)
    layers, width = question.layers or depth, question.width
    if width is None and layers != depth:  # the dial sets the width, the pin the layers
        width = round_up(64 * depth, HEAD_DIM[style])
    return shape_for(
        style,
        layers,
        context_len=seq_len_of(question),
        width=width,
        heads=question.heads,
        kv_heads=question.kv_heads,
        mlp=question.mlp,
        vocab_size=vocab_size_of(question, corpus_bytes),
        tie=question.tie,
        dropout=question.dropout,
        window_pattern=question.window_pattern,
    )


def trained_shape(name: str) -> ModelShape:
    """Return the shape of a trained model, by its name under runs/, its folder or its plan.json.

    Raises:
        BadQuestionError: there is no such run.
    """
    for path in (RUNS / name / "plan.json", Path(name) / "plan.json", Path(name)):
        try:
            found = path.is_file()
        except (OSError, ValueError):  # too long, or a zero byte in it
            continue
        if found:
            return read_plan(path).shape
    known = sorted(path.parent.name for path in RUNS.glob("*/plan.json"))
    hint = f"snugpt plan --task generate --model {known[0]}" if known else "snugpt demo"
    raise unknown_name("model", name[:80], known, hint=hint)


def _refuse_contradictions(question: Question, said: dict[str, object]) -> None:
    """Nothing that is said may be without effect."""
    for rivals in RIVALS:
        both = [field for field in said if field in rivals]
        if len(both) > 1 and both != ["vocab_size", "byte_tokens"]:
            raise refused(
                f"{both[0]} and {both[1]} decide the same thing",
                question,
                **{both[1]: None},
            )
    foreign = TRAINING_ONLY if question.task == "generate" else GENERATION_ONLY
    wrong = [field for field in said if field in foreign]
    if question.task == "generate" and question.objective != "speed":
        wrong.append("objective")
    if wrong:
        blank = Question()
        raise refused(
            f"{wrong[0]} = {said[wrong[0]]!r} decides nothing for task = {question.task}",
            question,
            **{field: getattr(blank, field) for field in wrong},
        )
    shaped = [field for field in said if field in _SHAPE_FIELDS]
    if question.model is not None and shaped:
        raise refused(
            f"{shaped[0]} can't be changed: model = {question.model!r} has its shape",
            question,
            **dict.fromkeys(shaped),
        )
    if question.depth is not None and question.layers is not None and question.width is not None:
        raise refused(
            f"depth = {question.depth} decides nothing where layers and width are given",
            question,
            depth=None,
        )

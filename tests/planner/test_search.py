"""What the search chooses: the fastest that fits, pins kept, the nearest where nothing fits."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from machines import processor

from snugpt.errors import BadQuestionError
from snugpt.estimate.memory import memory_estimate
from snugpt.estimate.speed import speed_estimate
from snugpt.planner.answer import answer, plan
from snugpt.planner.search import TIE_SHARE
from snugpt.spec.plan import Plan, decode_plan, encode_plan
from snugpt.spec.question import Question
from snugpt.spec.recipe import GenerationRecipe, TrainingRecipe
from snugpt.units import GIB, MIB

FITTING: list[dict[str, Any]] = [
    {"gpu": "rtx-4090", "depth": 12},
    {"gpu": "rtx-3060", "depth": 12, "objective": "memory"},
    {"gpu": "t4", "depth": 8, "style": "llama", "seq_len": 512},
    {"gpu": "gtx-1070", "preset": "small"},
    {"gpu": "a100-40gb", "depth": 20, "checkpoint": "blocks", "reserve": 2 * GIB},
    {"gpu": "h100", "depth": 12, "loss": "plain"},
]


@cache
def _planned(index: int) -> Plan:
    """The plan of a fitting question: frozen, so made once for all tests."""
    return plan(**FITTING[index])


def _training(made: Plan) -> TrainingRecipe:
    assert isinstance(made.recipe, TrainingRecipe)
    return made.recipe


def _with_batch(made: Plan, batch: int) -> tuple[bool, float]:
    """Whether a recipe with another device batch fits, and its step time: the estimate itself."""
    recipe = _training(made)
    rows = recipe.total_batch_tokens // recipe.seq_len
    other = msgspec.structs.replace(recipe, device_batch_size=batch, grad_accum_steps=rows // batch)
    memory = memory_estimate(made.shape, other, made.gpu, reserve_bytes=made.question.reserve)
    return memory.fits, speed_estimate(made.shape, other, made.gpu).step_s


@pytest.mark.parametrize("index", range(len(FITTING)))
def test_the_next_larger_batch_does_not_fit_or_is_not_faster(index: int) -> None:
    made = _planned(index)
    recipe = _training(made)
    assert made.fits
    rows = recipe.total_batch_tokens // recipe.seq_len
    larger = [n for n in range(recipe.device_batch_size + 1, rows + 1) if rows % n == 0]
    if made.question.objective == "memory":
        assert recipe.device_batch_size == 1
    elif larger:
        fits, step_s = _with_batch(made, larger[0])
        assert not fits or step_s >= made.speed.step_s * (1 - 1.01 * TIE_SHARE)


@pytest.mark.parametrize("index", range(len(FITTING)))
def test_a_plan_holds_together(index: int) -> None:
    made, recipe = _planned(index), _training(_planned(index))
    product = recipe.device_batch_size * recipe.seq_len * recipe.grad_accum_steps
    assert product * recipe.world_size == recipe.total_batch_tokens
    assert sum(term.bytes for term in made.memory.terms) == made.memory.allocated_bytes
    assert made.fits == (made.memory.process_bytes.high <= made.memory.capacity_bytes)
    assert made.memory.capacity_bytes == made.gpu.usable_bytes - made.question.reserve
    for field, value in FITTING[index].items():
        if hasattr(recipe, field):
            assert getattr(recipe, field) == value
    assert made.parameters.total == sum(made.parameters.groups.values())
    assert all(other.memory.fits for other in made.alternatives)


def test_the_same_question_gives_the_same_bytes() -> None:
    first, second = (plan(gpu="rtx-4090", depth=12) for _ in range(2))
    assert encode_plan(first) == encode_plan(second)
    assert decode_plan(encode_plan(first), "plan.json") == first


def test_the_smallest_peak_is_smaller_than_the_fastests() -> None:
    fast = plan(gpu="rtx-4090", depth=12)
    small = plan(gpu="rtx-4090", depth=12, objective="memory")
    assert small.memory.process_bytes.high < fast.memory.process_bytes.high
    assert small.speed.step_s > fast.speed.step_s


@pytest.mark.parametrize(
    ("gpu", "dtype"), [("rtx-3060", "bf16"), ("t4", "fp16"), ("gtx-1070", "fp16"), ("m1", "fp32")]
)
def test_bf16_where_the_card_has_it_and_fp16_on_older_ones(gpu: str, dtype: str) -> None:
    gpu = "m1-16gb" if gpu == "m1" else gpu
    assert _training(plan(gpu=gpu, depth=4, seq_len=256)).compute_dtype == dtype


@pytest.mark.parametrize(("gpu", "dtype"), [("t4", "fp16"), ("cpu", "fp32")])
def test_bf16_elsewhere_is_refused_with_what_works(gpu: str, dtype: str) -> None:
    with pytest.raises(BadQuestionError, match="no bf16") as caught:
        answer(
            Question(gpu=gpu, depth=4, compute_dtype="bf16"),
            machine=processor() if gpu == "cpu" else None,
        )
    assert caught.value.hint == f"snugpt plan --gpu {gpu} --depth 4 --compute-dtype {dtype}"


@pytest.mark.parametrize("field", ["compute_dtype", "weight_dtype"])
def test_fp16_is_refused_off_cuda_and_kept_on_it(field: str) -> None:
    task = {"task": "generate"} if field == "weight_dtype" else {}
    asked = Question(gpu="cpu", depth=4, **{field: "fp16"}, **task)
    with pytest.raises(BadQuestionError, match="it is for CUDA"):
        answer(asked, machine=processor())
    for gpu in ("t4", "rtx-3060"):
        recipe = plan(gpu=gpu, depth=4, **{field: "fp16"}, **task).recipe
        assert getattr(recipe, field) == "fp16"


@pytest.mark.parametrize("vocab_size", [256, 2048, 32768, 50304, 200_000])
def test_a_chunk_of_logits_stays_within_128_mib(vocab_size: int) -> None:
    recipe = _training(plan(gpu="h100", depth=4, vocab_size=vocab_size, byte_tokens=None))
    tokens = recipe.loss_chunk_tokens
    assert tokens & (tokens - 1) == 0
    assert 64 <= tokens <= recipe.seq_len
    assert tokens * vocab_size * 4 <= 128 * MIB or tokens == 64
    assert 2 * tokens * (vocab_size + 64) * 4 > 128 * MIB or tokens == recipe.seq_len


NOT_FITTING: list[dict[str, Any]] = [
    {"gpu": "rtx-3060", "depth": 40},
    {"gpu": "rtx-4090", "depth": 12, "device_batch_size": 256, "checkpoint": "none"},
    {"gpu": "t4", "depth": 32, "seq_len": 4096},
    {"gpu": "gtx-1060-6gb", "depth": 20},
    {"gpu": "rtx-4090", "layers": 48, "width": 4096},
    {"gpu": "t4", "depth": 4, "vocab_size": 4_000_000},
    {"gpu": "t4", "depth": 4, "reserve": 14 * GIB},
    {"gpu": "t4", "task": "generate", "depth": 30, "batch": 4096},
    {"gpu": "gtx-1070", "task": "generate", "depth": 48},
]


@pytest.mark.parametrize("fields", NOT_FITTING)
def test_where_it_does_not_fit_the_nearest_that_does_comes_first(fields: dict[str, Any]) -> None:
    made = plan(**fields)
    assert not made.fits
    assert made.memory.process_bytes.high > made.memory.capacity_bytes
    nearest = made.alternatives[0]
    assert nearest.memory.process_bytes.high <= nearest.memory.capacity_bytes
    for field in ("seq_len", "device_batch_size", "batch", "checkpoint"):
        if field in fields and hasattr(made.recipe, field):
            assert getattr(made.recipe, field) == fields[field]


def test_pinned_levers_are_released_before_the_model_shrinks() -> None:
    made = plan(gpu="rtx-4090", depth=12, device_batch_size=256, checkpoint="none")
    assert made.alternatives[0].command == "snugpt plan --gpu rtx-4090 --depth 12 --checkpoint none"


def test_the_context_is_halved_before_the_model_shrinks_unless_it_is_pinned() -> None:
    made = plan(gpu="t4", depth=19)
    assert (made.fits, made.alternatives[0].change) == (False, "seq_len 512")
    assert made.alternatives[1].change.startswith("depth")
    assert plan(gpu="t4", depth=19, seq_len=2048).alternatives[0].change.startswith("depth")


@pytest.mark.parametrize("index", range(len(FITTING)))
def test_each_rung_of_the_ladder_buys_bytes_with_time(index: int) -> None:
    ladder = _planned(index).ladder
    assert (ladder[0].bytes_saved, ladder[0].time_factor) == (0, 1.0)
    for upper, lower in pairwise(ladder):
        assert lower.bytes_saved > upper.bytes_saved
        assert lower.time_factor >= upper.time_factor


def test_what_was_rejected_is_told_with_its_bytes() -> None:
    made = plan(gpu="rtx-4090", depth=12)
    larger, other = made.rejected[0], made.rejected[-1]
    assert larger.change == f"device_batch_size {2 * _training(made).device_batch_size}"
    assert "of 23.5 GiB; largest: activations" in larger.because
    assert other.change.startswith("checkpoint selective (qkv)")
    assert "x the time" in other.because


def test_the_nearest_depth_is_the_deepest_that_fits() -> None:
    made = plan(gpu="rtx-3060", depth=40)
    depth = int(made.alternatives[0].command.rpartition(" ")[2])
    assert plan(gpu="rtx-3060", depth=depth).fits
    assert not plan(gpu="rtx-3060", depth=depth + 1).fits


def test_a_measured_rate_replaces_the_assumed_one() -> None:
    question = Question(gpu="cpu", depth=2, seq_len=128, total_batch_tokens=1024)
    assumed = answer(question, machine=processor())
    measured = answer(question, machine=processor(flops_per_s=1e10))
    assert (assumed.speed.basis, measured.speed.basis) == ("assumed", "fitted")
    assert measured.speed.step_s > assumed.speed.step_s


def test_less_memory_never_gives_a_larger_plan() -> None:
    question = Question(gpu="cpu", depth=4, seq_len=512)
    sizes = [
        answer(question, machine=processor(capacity * GIB)).memory.process_bytes.high
        for capacity in (1, 2, 4, 8)
    ]
    assert sizes == sorted(sizes)


def test_generation_says_how_many_sequences_fit() -> None:
    fields = {"gpu": "gtx-1070", "task": "generate", "preset": "150M"}
    made = plan(**fields)
    assert isinstance(made.recipe, GenerationRecipe)
    note = next(note for note in made.notes if "sequences" in note)
    largest = int(note.split()[2].replace(",", ""))
    assert plan(**fields, batch=largest).fits
    assert not plan(**fields, batch=largest + 1 + largest // 40).fits


def test_generation_lengths_are_cut_to_the_context() -> None:
    made = plan(gpu="t4", task="generate", preset="tiny")
    assert isinstance(made.recipe, GenerationRecipe)
    assert made.recipe.prompt_tokens + made.recipe.max_new_tokens <= made.shape.context_len == 128
    with pytest.raises(BadQuestionError, match="context of 128"):
        plan(gpu="t4", task="generate", preset="tiny", prompt_tokens=120, max_new_tokens=9)


def test_a_trained_models_shape_is_read_from_its_run(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(gpu="t4", depth=3, seq_len=256, vocab_size=512)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "plan.json").write_bytes(encode_plan(made))
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "runs/mine", "runs/mine/plan.json"):
        assert plan(gpu="t4", task="generate", model=name).shape == made.shape
    with pytest.raises(BadQuestionError, match="did you mean 'mine'"):
        plan(gpu="t4", task="generate", model="mind")
    with pytest.raises(BadQuestionError, match="depth"):
        plan(gpu="t4", task="generate", model="mine", depth=4)


def test_old_cards_come_with_the_install_line() -> None:
    notes = " ".join(plan(gpu="gtx-1070", depth=4).notes)
    assert "uv pip install" in notes
    assert "uv pip install" not in " ".join(plan(gpu="rtx-4090", depth=4).notes)

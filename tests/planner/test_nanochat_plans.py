"""Plans for nanochat: its own batch rules, its own command line, what its user could have back."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snugpt.errors import BadQuestionError
from snugpt.estimate.stacks.catalogue import STACKS, find_stack
from snugpt.planner.answer import answer, plan
from snugpt.spec.plan import Plan, decode_plan, encode_plan
from snugpt.spec.question import Question
from snugpt.spec.recipe import TrainingRecipe
from snugpt.units import GIB

NAMES = [name for name in STACKS if name != "snugpt"]
OCTOBER, FEBRUARY, MARCH, JULY = NAMES
# The flags of scripts/base_train.py at each commit, typed off its parser and, for October, off the
# settings that its configurator may override.
COMMON = {
    "depth", "max-seq-len", "num-iterations", "target-param-data-ratio", "device-batch-size",
    "total-batch-size", "weight-decay", "matrix-lr", "warmdown-ratio", "eval-every",
}  # fmt: skip
FLAGS = {
    OCTOBER: {each.replace("-", "_") for each in COMMON} | {"warmup_ratio", "grad_clip"},
    FEBRUARY: COMMON | {"warmup-ratio", "window-pattern", "save-every", "fp8"},
    MARCH: COMMON | {"window-pattern", "save-every", "fp8"},
    JULY: COMMON | {"window-pattern", "save-every", "fp8"},
}


def training(made: Plan) -> TrainingRecipe:
    assert isinstance(made.recipe, TrainingRecipe)
    return made.recipe


def flags_of(command: str) -> dict[str, str]:
    words = shlex.split(command)
    options = words[words.index("scripts.base_train") + 1 :]
    found = {}
    for word in options:
        if word != "--":
            name, _, value = word.removeprefix("--").partition("=")
            found[name] = value
    return found


@pytest.mark.parametrize(
    ("fields", "command"),
    [
        (
            {"stack": MARCH, "num_gpus": 8, "depth": 20},
            "torchrun --standalone --nproc_per_node=8 -m scripts.base_train --"
            " --depth=20 --device-batch-size=32",
        ),
        (
            {"stack": OCTOBER, "num_gpus": 8, "depth": 20, "device_batch_size": 32},
            "torchrun --standalone --nproc_per_node=8 -m scripts.base_train --"
            " --depth=20 --device_batch_size=32",
        ),
        (
            {"stack": OCTOBER, "depth": 12, "seq_len": 1024, "total_batch_tokens": 131072,
             "device_batch_size": 4, "tokens_per_param": 8.0, "clip_norm": 1.0},
            "python -m scripts.base_train --depth=12 --max_seq_len=1024 --device_batch_size=4"
            " --total_batch_size=131072 --target_param_data_ratio=8 --grad_clip=1.0",
        ),
        (
            {"stack": JULY, "depth": 24, "num_gpus": 8, "fp8": True, "tokens_per_param": 8.0,
             "device_batch_size": 16},
            "torchrun --standalone --nproc_per_node=8 -m scripts.base_train --"
            " --depth=24 --device-batch-size=16 --target-param-data-ratio=8 --fp8",
        ),
        (
            {"stack": FEBRUARY, "depth": 12, "launcher": "torchrun", "num_iterations": 100,
             "window_pattern": "L", "weight_decay": 0.0},
            "torchrun --standalone --nproc_per_node=1 -m scripts.base_train --"
            " --depth=12 --device-batch-size=64 --num-iterations=100 --window-pattern=L"
            " --weight-decay=0.0",
        ),
    ],
)  # fmt: skip
def test_the_command_is_nanochats_own(fields: dict[str, Any], command: str) -> None:
    made = plan(gpu="h100", **fields)
    assert made.fits
    assert made.command == command


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    stack=st.sampled_from(NAMES),
    fields=st.fixed_dictionaries(
        {"depth": st.sampled_from([4, 8, 12, 20])},
        optional={
            "seq_len": st.sampled_from([512, 1024, 1536]),
            "num_gpus": st.sampled_from([1, 2, 8]),
            "num_iterations": st.integers(1, 100),
            "matrix_learning_rate": st.sampled_from([0.01, 1.0]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "cooldown_fraction": st.sampled_from([0.0, 0.5]),
            "eval_every": st.integers(1, 1000),
        },
    ),
)
def test_every_command_is_one_nanochat_would_run(stack: str, fields: dict[str, Any]) -> None:
    made = plan(gpu="h100", stack=stack, **fields)
    recipe, given_flags = training(made), flags_of(made.command)
    assert given_flags.keys() <= FLAGS[stack]
    plain = {name.replace("_", "-"): value for name, value in given_flags.items()}
    # base_train's own arithmetic: the total must be whole micro-batches of all ranks
    automatic = 524_288 if stack == OCTOBER else None
    total = int(plain.get("total-batch-size", automatic or recipe.total_batch_tokens))
    rows = int(plain["device-batch-size"]) * int(plain.get("max-seq-len", 2048))
    assert total == recipe.total_batch_tokens
    assert total % (rows * recipe.world_size) == 0
    assert total // (rows * recipe.world_size) == recipe.grad_accum_steps
    if stack == OCTOBER:  # its configurator wants the type of the default
        for name in ("matrix_lr", "weight_decay", "warmdown_ratio"):
            assert "." in given_flags.get(name, "0.0"), made.command
        assert all("." not in given_flags.get(name, "") for name in ("depth", "eval_every"))


def test_a_float_is_written_as_one_though_a_config_file_has_a_whole_number() -> None:
    """October's configurator refuses `--grad_clip=1`: its default is a float."""
    asked = Question(gpu="h100", stack=OCTOBER, depth=4, clip_norm=1, weight_decay=0)
    assert flags_of(answer(asked).command).items() >= {
        ("grad_clip", "1.0"),
        ("weight_decay", "0.0"),
    }


def test_a_plan_names_the_resolved_stack_and_survives_json() -> None:
    made = plan(gpu="h100", stack="nanochat", depth=12)
    assert made.stack == training(made).stack == made.question.stack == JULY
    assert decode_plan(encode_plan(made), "plan.json") == made
    assert made.parameters.total == 286_261_730
    assert training(made).compile == "on"
    assert training(made).loss == "plain"


def test_horizons_are_those_of_each_version() -> None:
    october = training(plan(gpu="h100", stack=OCTOBER, depth=20, num_gpus=8))
    assert (october.total_batch_tokens, october.num_steps) == (524_288, 21_400)  # as it prints
    july = training(plan(gpu="h100", stack=JULY, depth=12))
    assert july.total_batch_tokens == 524_288
    assert july.num_steps == 12 * 110_100_912 // 524_288
    assert training(plan(gpu="h100", stack=MARCH, depth=24)).total_batch_tokens == 2**20


def test_terms_sum_to_allocated_and_the_bands_are_in_order() -> None:
    memory = plan(gpu="h100", stack=FEBRUARY, depth=12, num_gpus=8).memory
    assert sum(term.bytes for term in memory.terms) == memory.allocated_bytes
    reserved, process = memory.reserved_bytes, memory.process_bytes
    assert memory.allocated_bytes == reserved.low <= reserved.expected <= reserved.high
    assert process.low < process.expected < process.high
    outside = [
        each.process_bytes.high - each.reserved_bytes.high
        for each in (
            plan(gpu="h100", stack=FEBRUARY, depth=12).memory,
            plan(gpu="h100", stack=FEBRUARY, depth=12, launcher="torchrun").memory,
            memory,
        )
    ]
    assert outside == sorted(set(outside))  # NCCL takes something alone, and more between cards


def test_the_batch_that_published_runs_used_fits() -> None:
    """20 layers, October, 8 H100s: batch 32 is the default and ran, 73.7 GiB allocated."""
    made = plan(gpu="h100", stack=OCTOBER, depth=20, num_gpus=8, device_batch_size=32)
    assert made.fits
    assert made.memory.allocated_bytes / GIB == pytest.approx(73.65, abs=0.01)
    assert not plan(gpu="h100", stack=OCTOBER, depth=20, num_gpus=8, device_batch_size=64).fits


def notes_of(**fields: Any) -> str:
    return "\n".join(plan(gpu="h100", **fields).notes)


def test_what_the_collectives_hold_could_be_had_back() -> None:
    notes = notes_of(stack=OCTOBER, depth=32, num_gpus=8, device_batch_size=4)
    found = re.search(r"([\d.]+) GiB could be had back", notes)
    assert found is not None
    assert float(found[1]) * GIB / 1e9 == pytest.approx(20, abs=1)
    assert "sed -i" in notes
    assert "get_future" in notes
    assert "could be had back" not in notes_of(stack=JULY, depth=12)
    assert "start it with python" in notes_of(stack=MARCH, depth=12, launcher="torchrun")


def test_the_next_smaller_batch_is_named_with_its_bytes() -> None:
    made = plan(gpu="h100", stack=MARCH, depth=20, num_gpus=8)
    recipe = training(made)
    (note,) = (note for note in made.notes if "would save" in note)
    assert f"device_batch_size {recipe.device_batch_size // 2} would save" in note
    smaller = plan(
        gpu="h100", stack=MARCH, depth=20, num_gpus=8,
        device_batch_size=recipe.device_batch_size // 2,
    )  # fmt: skip
    saved = made.memory.process_bytes.high - smaller.memory.process_bytes.high
    assert float(note.split("save ")[1].split(" GiB")[0]) == pytest.approx(saved / GIB, rel=0.01)


def test_what_does_not_fit_has_alternatives_of_the_same_stack() -> None:
    made = plan(gpu="rtx-3060", stack="nanochat", depth=24)
    assert not made.fits
    for other in made.alternatives:
        assert other.memory.fits
        assert other.command.startswith(f"snugpt plan --stack {JULY} ")


def test_masked_windows_are_cautioned() -> None:
    def cautioned(gpu: str, **fields: Any) -> bool:
        made = plan(gpu=gpu, stack=MARCH, depth=12, **fields)
        return any("go through masks" in note for note in made.notes)

    assert cautioned("rtx-4090")
    assert not cautioned("rtx-4090", window_pattern="L")
    assert not cautioned("h100")


@pytest.mark.parametrize("stack", NAMES)
def test_every_field_is_either_planned_or_refused_by_its_name(stack: str) -> None:
    lacking = {
        "layers": 4, "width": 256, "heads": 2, "kv_heads": 1, "mlp": 512, "tie": True,
        "dropout": 0.1, "input": "builtin", "byte_tokens": True, "style": "gpt2", "preset": "d12",
        "loss_chunk_tokens": 64, "learning_rate": 1e-3, "seed": 1, "checkpoint": "blocks",
        "loss": "chunked", "optimizer": "adamw", "compute_dtype": "fp32",
    }  # fmt: skip
    options = find_stack(stack).options
    for field in ("clip_norm", "warmup_fraction"):
        if field not in options:
            lacking[field] = 0.5
    for field, value in lacking.items():
        with pytest.raises(BadQuestionError, match=rf"^{field} = .* is not an option of {stack}"):
            plan(gpu="h100", depth=4, stack=stack, **{field: value})


def test_without_its_compiler_july_needs_more_and_its_command_says_how() -> None:
    compiled = plan(stack="nanochat", gpu="h100", depth=12, device_batch_size=16)
    eager = plan(stack="nanochat", gpu="h100", depth=12, device_batch_size=16, compile="off")
    assert eager.memory.allocated_bytes > 1.2 * compiled.memory.allocated_bytes
    assert eager.speed.tokens_per_s.expected < compiled.speed.tokens_per_s.expected
    assert eager.command.startswith("TORCHDYNAMO_DISABLE=1 python -m scripts.base_train ")
    with pytest.raises(BadQuestionError, match=r"compile = 'off' is not an option.*autocast"):
        plan(stack="nanochat@2025-10", gpu="h100", depth=12, compile="off")

"""A mend is the run with one thing changed, planned again; what is said to fit was planned."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import msgspec
import pytest
from oom_reports import NAN, NANOCHAT, REPORTS

from snugpt.planner.answer import plan as make_plan
from snugpt.planner.doctor.commands import with_flags
from snugpt.planner.doctor.diagnosis import main_event
from snugpt.planner.doctor.examine import Finding, examine, examine_text
from snugpt.planner.doctor.mends import Mend, planned_mends
from snugpt.planner.doctor.messages import events_in
from snugpt.planner.doctor.patient import Patient, patient_of
from snugpt.planner.doctor.program import ProgramRun, program_of
from snugpt.planner.doctor.reading import read_stream
from snugpt.spec.plan import encode_plan
from snugpt.units import GIB

FULL = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"
    " capacity of 11.63 GiB of which 0.50 GiB is free. Including non-PyTorch memory, this process"
    " has 11.13 GiB memory in use. Of the allocated memory {allocated} GiB is allocated by PyTorch,"
    " and 200.00 MiB is reserved by PyTorch but unallocated."
)


def found(text: str, gpu: str | None = None, folder: Path | None = None) -> Finding:
    return examine_text(read_stream(io.BytesIO(text.encode())), "run.log", folder, gpu)


def program(text: str) -> ProgramRun:
    lines = read_stream(io.BytesIO(text.encode())).lines
    event = main_event(events_in(lines))
    return program_of(lines, len(lines) if event is None else event.line)


def beside_another(text: str) -> str:
    """The message on a card where process 7 holds 4 GiB."""
    return text.replace("Including", "Process 7 has 4.00 GiB memory in use. Including")


def flags(command: str | None) -> dict[str, str]:
    """The flags of a command line, names with underscores."""
    words = shlex.split(command or "")
    pairs = {}
    for at, word in enumerate(words):
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            pairs[name.replace("-", "_")] = value if equals else words[at + 1]
    return pairs


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of snugpt on a 12 GiB card, planned with a pinned batch."""
    made = make_plan(gpu="rtx-3060", depth=12, device_batch_size=8)
    (tmp_path / "plan.json").write_bytes(encode_plan(made))
    (tmp_path / "run.log").write_text(
        "run   runs/mine\nargv  snugpt train plan.json --name mine\n"
        "step      3/2521  loss 9.241  4.2 h left\n" + FULL.format(allocated="10.80") + "\n"
    )
    return tmp_path


def test_the_mends_of_a_run_keep_its_total_batch_and_save_what_was_lacking(
    run_folder: Path,
) -> None:
    finding = examine(run_folder / "run.log")
    assert finding.program == "snugpt"
    assert "after step 3 was logged" in finding.happened
    assert "predicted at the peak" in finding.held
    before = make_plan(gpu="rtx-3060", depth=12, device_batch_size=8)
    slip = patient(FULL.format(allocated="10.80"), run_folder).slip_bytes
    assert finding.mends
    for mend in finding.mends:
        said = {**flags(mend.command)}
        assert mend.command is not None
        assert mend.command.startswith("snugpt train --gpu rtx-3060 --depth 12")
        assert said.pop("name") == "mine-2"
        made = make_plan(**question_fields(said))
        assert made.recipe.total_batch_tokens == before.recipe.total_batch_tokens
        saved = before.memory.process_bytes.high - made.memory.process_bytes.high
        assert mend.saves_bytes == saved
        assert mend.process_bytes == made.memory.process_bytes.high + slip
        if mend.fits:
            assert saved >= 1.5 * GIB  # 2.00 were asked for, 0.50 were free


def question_fields(said: dict[str, str]) -> dict[str, object]:
    whole = ("depth", "device_batch_size", "seq_len", "num_gpus", "layers")
    return {name: int(value) if name in whole else value for name, value in said.items()}


def test_what_fits_and_is_exact_comes_first(run_folder: Path) -> None:
    mends = examine(run_folder / "run.log").mends
    order = [(mend.fits is False, mend.kind != "exact") for mend in mends]
    assert order == sorted(order)
    assert mends[0].fits
    assert mends[0].kind == "exact"


def patient(text: str, folder: Path | None = None) -> Patient:
    lines = read_stream(io.BytesIO(text.encode())).lines
    event = main_event(events_in(lines))
    assert event is not None
    plan = None
    if folder is not None:
        from snugpt.spec.plan import read_plan

        plan = read_plan(folder / "plan.json")
    found = patient_of(program_of(lines, event.line, plan), event, None)
    assert found is not None
    return found


def test_a_run_that_held_more_than_predicted_leaves_that_much_room(run_folder: Path) -> None:
    tight = patient(FULL.format(allocated="10.80"), run_folder)
    wide = patient(FULL.format(allocated="3.00"), run_folder)
    needed = round(10.80 * GIB) + 2 * GIB
    assert tight.slip_bytes == needed - tight.memory.allocated_bytes > 0
    assert wide.slip_bytes == 0
    for each in (tight, wide):
        for mend in planned_mends(each):
            if mend.fits and mend.process_bytes is not None and mend.kind == "exact":
                assert mend.process_bytes <= each.capacity_bytes


def test_what_saves_less_than_was_lacking_does_not_fit(run_folder: Path) -> None:
    # By its prediction the run fitted; only what was asked for and not free says by how much not.
    said = {}
    for tried in ("2.00", "2.75"):
        report = FULL.format(allocated="3.00").replace("allocate 2.00", f"allocate {tried}")
        mends = planned_mends(patient(report, run_folder))
        said[tried] = next(mend for mend in mends if mend.change.startswith("device_batch_size"))
        assert said[tried].fits
    assert said["2.00"].saves_bytes is not None
    assert 1.5 * GIB <= said["2.00"].saves_bytes < 2.25 * GIB
    assert said["2.75"].saves_bytes is not None
    assert said["2.75"].saves_bytes >= 2.25 * GIB


def test_what_others_hold_is_not_the_run_s(run_folder: Path) -> None:
    alone = patient(FULL.format(allocated="3.00"), run_folder)
    shared = patient(beside_another(FULL.format(allocated="3.00")), run_folder)
    assert alone.capacity_bytes - shared.capacity_bytes == 4 * GIB


def test_what_was_left_to_others_is_taken_once(tmp_path: Path) -> None:
    made = make_plan(gpu="rtx-3060", depth=12, device_batch_size=8, reserve=GIB)
    (tmp_path / "plan.json").write_bytes(encode_plan(made))
    capacity = round(11.63 * GIB)
    alone, beside = FULL.format(allocated="3.00"), beside_another(FULL.format(allocated="3.00"))
    assert patient(alone, tmp_path).capacity_bytes == capacity - GIB
    assert patient(beside, tmp_path).capacity_bytes == capacity - 4 * GIB
    bare = "CUDA out of memory. Tried to allocate 1.00 GiB."
    assert patient(bare, tmp_path).capacity_bytes == made.memory.capacity_bytes


def test_a_run_in_ram_ran_out_of_ram(tmp_path: Path) -> None:
    made = make_plan(gpu="cpu", layers=2, width=64, heads=2, seq_len=64, device_batch_size=4)
    (tmp_path / "plan.json").write_bytes(encode_plan(made))
    (tmp_path / "run.log").write_text("error: out of memory in step 1 with device_batch_size = 4\n")
    finding = examine(tmp_path)
    assert finding.happened.startswith("the host ran out of memory")
    assert any(mend.change.startswith("device_batch_size 2") for mend in finding.mends)


def test_the_last_program_of_a_speedrun_is_the_one_that_failed() -> None:
    start, _, rest = NANOCHAT.partition("[rank2]: Traceback")
    later = "python -m scripts.chat_sft -- --device-batch-size=8 --run=x\n"
    failed = ("[rank2]: Traceback" + rest).replace("base_train", "chat_sft")
    finding = found(start + later + failed + "python -m scripts.base_train -- --depth=4\n")
    assert finding.program == "nanochat"
    assert "not chat_sft" in finding.notes[0]
    assert all(mend.fits is None for mend in finding.mends)
    assert flags(finding.mends[0].command)["device_batch_size"] == "4"


def test_nanochat_s_own_command_is_kept_but_for_the_batch() -> None:
    finding = found(NANOCHAT)
    assert finding.program == "nanochat"
    first = finding.mends[0]
    assert first.fits
    assert first.command == (
        "torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20 --run=d20"
        " --device_batch_size=16"
    )
    made = make_plan(
        stack="nanochat@2025-10", gpu="a100-80gb", depth=20, num_gpus=8, device_batch_size=16
    )
    assert first.process_bytes is not None
    assert made.memory.process_bytes.high <= first.process_bytes <= made.memory.capacity_bytes


def test_the_card_the_user_names_is_the_one_that_is_planned_for() -> None:
    named = found(NANOCHAT, gpu="h100")
    assert "NVIDIA H100 80GB HBM3" in " ".join(named.notes)
    printed = NANOCHAT.replace(
        "Vocab size", "GPU: NVIDIA H100 80GB HBM3 | Peak FLOPS (BF16): 9.89e+14\nVocab size"
    )
    assert "NVIDIA H100 80GB HBM3" in " ".join(found(printed).notes)


@pytest.mark.parametrize(
    ("text", "stack", "fields"),
    [
        (NANOCHAT, "nanochat@2025-10", {"depth": 20, "num_gpus": 8, "device_batch_size": 32}),
        (
            "python -m scripts.base_train --depth=12 --device-batch-size=4 --fp8",
            "nanochat@2026-07",
            {"depth": 12, "device_batch_size": 4, "fp8": True, "num_gpus": None},
        ),
        (
            '"n_layer": 24,\n"window_pattern": "SSSL"\n'
            "Tokens / micro-batch / rank: 8 x 1024 = 8,192\nTokens / micro-batch: 32,768\n"
            "Total batch size 65,536 => gradient accumulation steps: 2",
            "nanochat@2026-02",
            {"depth": 24, "seq_len": 1024, "num_gpus": 4, "total_batch_tokens": 65536},
        ),
        (
            "COMPUTE_DTYPE: torch.bfloat16 (auto)\n"
            "Tokens / micro-batch / rank: 8 x 2048 = 16,384\n",
            "nanochat@2026-07",
            {"device_batch_size": 8, "depth": 20},
        ),
        (
            "torchrun --nproc_per_node=1 \\\n  -m scripts.base_train -- \\\n  --depth=8",
            "nanochat@2026-07",
            {"depth": 8, "launcher": "torchrun", "num_gpus": 1},
        ),
    ],
)
def test_what_nanochat_prints_says_which_run_it_was(
    text: str, stack: str, fields: dict[str, object]
) -> None:
    question = program(text).question
    assert question is not None
    assert question.stack == stack
    assert {name: getattr(question, name) for name in fields} == fields


def test_one_card_s_gradients_need_not_go_through_nccl() -> None:
    log = (
        "GPU: NVIDIA GeForce RTX 4090 | Peak FLOPS (BF16): 1.65e+14\n"
        "torchrun --nproc_per_node=1 -m scripts.base_train -- --depth=12 --device-batch-size=16\n"
        '"window_pattern": "SSSL"\nCUDA out of memory. Tried to allocate 100.00 MiB.'
    )
    changes = {mend.change for mend in found(log).mends}
    assert "started with python, not torchrun" in changes


def test_nanogpt_keeps_its_step_in_its_own_flags() -> None:
    log = "$ python train.py config/train_gpt2.py --batch_size=12\n" + REPORTS["1.13"].text
    finding = found(log)
    assert finding.program == "nanogpt"
    half = next(mend for mend in finding.mends if mend.change.startswith("batch_size"))
    assert flags(half.command)["batch_size"] == "6"
    assert flags(half.command)["gradient_accumulation_steps"] == "80"
    assert half.fits is None
    ours = next(mend for mend in finding.mends if mend.kind == "program")
    assert ours.command is not None
    assert "--gpu v100-16gb --style gpt2 --layers 12" in ours.command


def test_settings_that_nanogpt_prints_count() -> None:
    log = "Overriding config with config/x.py:\n# small\nn_layer = 6\nbatch_size = 64 # rows\n"
    log += "block_size = 256\nOverriding: n_head = 8\ntokens per iteration will be: 16,384\n"
    fields = program("python train.py config/x.py --n_layer=5\n" + log).fields
    assert (fields["layers"], fields["device_batch_size"]) == (5, 64)
    assert (fields["seq_len"], fields["heads"], fields["grad_accum_steps"]) == (256, 8, 40)


def test_an_odd_batch_is_divided_so_that_the_step_stays() -> None:
    command = "python t.py --per_device_train_batch_size 9 --gradient_accumulation_steps 4"
    half = found(f"$ {command}\n{REPORTS['2.6, full'].text}").mends[0]
    assert half.command == command.replace("9", "3").replace("4", "12")
    assert half.kind == "exact"


def test_fragments_and_neighbours_are_mended_before_the_batch() -> None:
    log = "python t.py --batch_size 8\n" + REPORTS["2.1, fragmented"].text
    first = found(log).mends[0]
    assert first.command == (
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python t.py --batch_size 8"
    )
    assert first.saves_bytes == round(4.84 * GIB)
    others = beside_another(FULL.format(allocated="6.00"))
    assert found(others).mends[0].command == "ps -o pid,user,etime,args -p 7"


def test_where_no_exact_mend_fits_the_model_and_the_card_are_changed() -> None:
    log = (
        "GPU: NVIDIA GeForce RTX 3060 | Peak FLOPS (BF16): 5.1e+13\n"
        "python -m scripts.base_train --depth=26 --device-batch-size=4\n"
        "CUDA out of memory. Tried to allocate 1.00 GiB."
    )
    mends = found(log).mends
    kinds = [mend.kind for mend in mends]
    assert kinds.index("model") < kinds.index("machine")
    assert all(mend.fits for mend in mends if mend.kind in ("model", "machine"))
    (shallower,) = [mend for mend in mends if mend.change.startswith("depth")]
    made = make_plan(stack="nanochat", gpu="rtx-3060", **question_fields(flags(shallower.command)))
    assert made.fits
    assert mends[-1].fits is False  # what was tried in vain is shown last


def test_a_loss_that_is_no_number_gets_lower_rates_by_the_plan(run_folder: Path) -> None:
    (run_folder / "run.log").write_text("error: loss is nan after step 12; kept\n")
    mends = examine(run_folder / "run.log").mends
    rates = next(mend for mend in mends if "rates" in mend.change)
    schedule = make_plan(gpu="rtx-3060", depth=12, device_batch_size=8).recipe.schedule
    said = float(flags(rates.command)["learning_rate"])
    assert said == pytest.approx(schedule.learning_rate / 3, rel=0.01)
    assert found(NAN).mends[0].kind == "inexact"


def test_the_folder_of_a_run_without_a_log_is_read_by_its_measurement(run_folder: Path) -> None:
    import json

    (run_folder / "run.log").unlink()
    made = json.loads((run_folder / "plan.json").read_bytes())
    assert not examine(run_folder).recognised
    measured = {
        "schema": 1, "id": "x", "time": "2026-11-20T00:00:00Z", "program": "snugpt train",
        "outcome": "oom", "gpu_id": "rtx-3060", "gpu_name": "NVIDIA GeForce RTX 3060",
        "allocated_bytes": 9 * GIB, "reserved_bytes": 10 * GIB, "process_bytes": 11 * GIB,
        "environment": {"python": "3", "platform": "linux", "device": "x", "snugpt": "0"},
        "shape": made["shape"], "recipe": made["recipe"],
    }  # fmt: skip
    (run_folder / "measurement.json").write_text(json.dumps(measured))
    finding = examine(run_folder)
    assert finding.recognised
    assert "9.00 GiB tensors, 1.00 GiB cached" in finding.held
    assert finding.mends[0].fits


def test_a_damaged_plan_beside_a_log_is_passed_over(run_folder: Path) -> None:
    (run_folder / "plan.json").write_text("{")
    finding = examine(run_folder / "run.log")
    assert finding.recognised
    assert all(mend.fits is None for mend in finding.mends)


def test_the_plan_that_the_command_names_is_the_run_s(run_folder: Path) -> None:
    (run_folder / "plan.json").rename(run_folder / "mine.json")
    log = run_folder / "run.log"
    log.write_text(log.read_text().replace("plan.json", str(run_folder / "mine.json")))
    assert examine(log).mends[0].fits


def test_a_run_whose_flags_are_in_the_log_needs_no_plan() -> None:
    log = "argv  snugpt train --gpu rtx-3060 --depth 12 --device_batch_size=8\n"
    finding = found(log + FULL.format(allocated="10.80"))
    assert finding.program == "snugpt"
    assert finding.mends[0].fits
    assert flags(finding.mends[0].command)["depth"] == "12"


@pytest.mark.parametrize(
    ("words", "changes", "command"),
    [
        (["a", "--b=1", "--c", "2"], {"b": 3, "c": 4}, "a --b=3 --c 4"),
        (["a", "--x-y=1", "--flag"], {"x_y": 2}, "a --x-y=2 --flag"),
        (["a", "--flag", "--b"], {"flag": 1}, "a --flag 1 --b"),
        (["a"], {"new-one": 5}, "a --new-one=5"),
        (["V=1", "a", "x; y"], {}, "V=1 a 'x; y'"),
    ],
)
def test_only_the_named_flags_of_a_command_change(
    words: list[str], changes: dict[str, object], command: str
) -> None:
    assert with_flags(words, changes) == command


def test_a_mend_is_plain_data() -> None:
    mend = Mend(change="x", kind="exact", fits=True)
    assert msgspec.json.decode(msgspec.json.encode(mend), type=Mend) == mend

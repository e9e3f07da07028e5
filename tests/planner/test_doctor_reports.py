"""What real messages say: sizes to the byte, who held what, and why it was not enough."""

from __future__ import annotations

import io
import textwrap

import msgspec
import pytest
from oom_reports import (
    BACKWARD_TWICE,
    CHILD_FAILED,
    INTERLEAVED,
    NAN,
    NANOCHAT,
    NO_KERNELS,
    REPORTS,
    TIMEOUT,
)

from snugpt.planner.doctor.diagnosis import cause_of, hidden_bytes, main_event
from snugpt.planner.doctor.examine import Finding, examine_text
from snugpt.planner.doctor.messages import events_in
from snugpt.planner.doctor.reading import Line, read_stream
from snugpt.planner.doctor.report import (
    BackwardTwice,
    CollectiveTimeout,
    Killed,
    NoKernels,
    NotANumber,
    OutOfMemory,
    SharedMemory,
)
from snugpt.units import GIB, MIB


def lines(text: str) -> tuple[Line, ...]:
    return read_stream(io.BytesIO(text.encode())).lines


def found(text: str, gpu: str | None = None) -> Finding:
    return examine_text(read_stream(io.BytesIO(text.encode())), "run.log", None, gpu)


def report_of(text: str) -> OutOfMemory:
    (event,) = events_in(lines(text))
    assert isinstance(event, OutOfMemory)
    return msgspec.structs.replace(event, line=0)


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_read_to_the_byte(name: str) -> None:
    report = REPORTS[name]
    event = report_of(report.text)
    assert {field: getattr(event, field) for field in report.says} == report.says
    assert cause_of(event) == report.cause


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_that_was_wrapped_between_words_says_the_same(name: str) -> None:
    whole = report_of(REPORTS[name].text)
    for width in (60, 79, 100, 132):
        wrapped = textwrap.fill(REPORTS[name].text, width, break_long_words=False)
        assert report_of(wrapped) == whole


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_that_a_terminal_cut_anywhere_says_the_same(name: str) -> None:
    text = REPORTS[name].text
    whole = report_of(text)
    for width in (96, 120, 132, 200):
        cut = [text[at : at + width] for at in range(0, len(text), width)]
        assert report_of("\n".join(cut)) == whole


def test_a_process_that_holds_what_the_allocator_does_is_this_one() -> None:
    event = report_of(REPORTS["2.5, another process"].text)
    assert [use.pid for use in event.others] == [608946]
    assert report_of(REPORTS["2.1, in a container"].text).others == ()


def test_of_two_that_hold_as_much_the_nearer_is_this_one() -> None:
    text = REPORTS["2.1, in a container"].text.replace(
        "Process 20398", "Process 1 has 14.90 GiB memory in use. Process 20398"
    )
    event = report_of(text)
    assert event.process_bytes == round(14.52 * GIB)
    assert [use.pid for use in event.others] == [1]


def test_memory_that_nobody_names_is_others() -> None:
    event = report_of(REPORTS["2.5, others unnamed"].text)
    assert 2.7 * GIB < hidden_bytes(event) < 2.8 * GIB
    assert hidden_bytes(report_of(REPORTS["2.3"].text)) == 0


def test_ranks_that_torchrun_mixed_are_told_apart() -> None:
    first, second = events_in(lines(INTERLEAVED))
    assert isinstance(first, OutOfMemory)
    assert isinstance(second, OutOfMemory)
    assert (first.rank, first.device, second.rank, second.device) == (0, 0, 1, 1)
    assert first.tried_bytes == round(1.88 * GIB)
    assert first.allocated_bytes == round(29.04 * GIB)
    assert second.cached_bytes == round(124.10 * MIB)
    assert first.place.phase == "backward"
    assert first.place.where == "/content/llama2.c/train.py:312"
    assert second.place.phase == "evaluate"
    assert "(ranks 0, 1) in backward" in found(INTERLEAVED).happened


def test_a_layer_made_again_in_backward_fails_in_backward() -> None:
    text = """\
Traceback (most recent call last):
  File "train.py", line 9, in <module>
    loss.backward()
  File "/x/site-packages/torch/utils/checkpoint.py", line 300, in backward
    outputs = ctx.run_function(*detached_inputs)
  File "model.py", line 50, in forward
    return F.linear(x, self.weight)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.
"""
    event = report_of(text)
    assert (event.place.phase, event.place.where) == ("backward", "model.py:50")


@pytest.mark.parametrize(
    ("source", "phase"),
    [
        ("    optimizer.step()", "optimizer"),
        ("    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)", "clip"),
        ("    loss = F.cross_entropy(logits.view(-1, V), y)", "loss"),
        ("    val_bpb = evaluate_bpb(model, val_loader, steps, token_bytes)", "evaluate"),
        ("    model.to(device)", "load"),
        ("    logits, loss = model(x, y)", "forward"),
        ("    x = torch.cat(parts)", None),
    ],
)
def test_the_phase_is_that_of_the_line_that_failed(source: str, phase: str | None) -> None:
    text = f'Traceback (most recent call last):\n  File "t.py", line 3, in <module>\n{source}\n'
    if phase == "forward":
        text += '  File "m.py", line 8, in forward\n    return self.wte(x)\n'
    text += "RuntimeError: CUDA out of memory. Tried to allocate 2.00 MiB."
    assert report_of(text).place.phase == phase


def test_a_compiled_step_names_the_buffer_it_asked_for() -> None:
    happened = found(NANOCHAT).happened
    assert "GPU 2 (rank 2) in backward" in happened
    assert "65536 x 65536: a row for each of 32 x 2048 tokens" in happened


@pytest.mark.parametrize("sizes", ["65536 65536", ", ,", "7" * 90, "1,,2"])
def test_a_buffer_whose_sizes_are_torn_is_no_trouble(sizes: str) -> None:
    text = NANOCHAT.replace("((65536, 65536)", f"(({sizes})")
    assert "rank 2" in found(text).happened


def test_a_kill_has_its_rank_and_is_no_proof_of_anything() -> None:
    first, second = events_in(lines(CHILD_FAILED))
    assert isinstance(first, Killed)
    assert isinstance(second, Killed)
    assert (first.rank, first.proven) == (3, False)
    assert "most often" in found(CHILD_FAILED).why


@pytest.mark.parametrize(
    ("text", "proven", "size"),
    [
        ("./train.sh: line 1:  7364 Killed                  python3 train.py", False, None),
        ("Killed", False, None),
        ("bash:   748 Killed                  python t.py > t.log", False, None),
        ("process exited with code 137", False, None),
        ("Training task exit with status code 137", False, None),
        ("DataLoader worker (pid 12847) is killed by signal: Killed.", False, None),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=5.batch.", True, None),
        (
            "[12.3] Out of memory: Killed process 7 (python) total-vm:9kB, anon-rss:2097152kB,",
            True,
            2 * GIB,
        ),
    ],
)
def test_every_way_to_say_killed_is_known(text: str, proven: bool, size: int | None) -> None:
    (event,) = events_in(lines(text))
    assert isinstance(event, Killed)
    assert (event.proven, event.resident_bytes) == (proven, size)


def test_the_first_loss_that_is_no_number_is_found_with_the_last_that_is() -> None:
    (event,) = events_in(lines(NAN))
    assert isinstance(event, NotANumber)
    assert (event.step, event.value, event.last_finite) == (3010, "nan", 4.249)
    finding = found(NAN)
    assert "fp16" in finding.why
    assert "--dtype=bfloat16" in (finding.mends[0].command or "")


@pytest.mark.parametrize(
    "text",
    [
        "step 00001/00528 (0.19%) | loss: nan | lrm: 0.05 | dt: 1259.08ms",
        "Step 00000 | Validation bpb: nan",
        "{'loss': nan, 'learning_rate': 1e-5}",
        "epoch 3 train_loss=inf",
        "error: loss is nan after step 12; earlier checkpoints are kept",
        "Loss: tensor(nan, device='cuda:0')",
    ],
)
def test_a_loss_that_is_no_number_is_known_however_it_is_printed(text: str) -> None:
    (event,) = events_in(lines(text))
    assert isinstance(event, NotANumber)


@pytest.mark.parametrize(
    "text",
    ["nanochat loss 3.2", "loss: 1.5 nanoseconds", "the loss is information", "exit code 1370",
     "finance loss 12", "memory usage: 12 GiB", "killed it", "saved 137 files"],
)  # fmt: skip
def test_what_only_looks_like_a_failure_is_none(text: str) -> None:
    assert events_in(lines(text)) == ()


def test_the_rank_that_did_not_come_is_named() -> None:
    first = events_in(lines(TIMEOUT))[0]
    assert isinstance(first, CollectiveTimeout)
    assert (first.operation, first.timeout_s, first.sequence) == ("ALLREDUCE", 600, ((1, 808),))
    finding = found(TIMEOUT)
    assert "3 ranks (0, 1, 3) waited 600 s for others in allreduce" in finding.happened
    assert "rank 2 did not come" in finding.why


def test_a_rank_that_is_behind_is_named() -> None:
    # Each rank's watchdog reports everything that it waits for, in any order.
    behind = TIMEOUT.replace("SeqNum=808", "SeqNum=806", 1)
    later = TIMEOUT.splitlines()[0].replace("SeqNum=808", "SeqNum=811")
    assert "rank 1 is behind: it waits in collective 806" in found(f"{later}\n{behind}{later}").why


def test_who_is_out_of_memory_comes_before_who_waited_and_who_was_killed() -> None:
    text = TIMEOUT + CHILD_FAILED + NAN + REPORTS["2.3"].text
    event = main_event(events_in(lines(text)))
    assert isinstance(event, OutOfMemory)
    assert set(found(text).also) == {"collective timeout", "killed", "not a number"}


def test_a_second_backward_is_shown_with_the_user_s_own_line() -> None:
    (event,) = events_in(lines(BACKWARD_TWICE))
    assert isinstance(event, BackwardTwice)
    finding = found(BACKWARD_TWICE)
    assert "/home/me/makemore.py:42" in finding.happened
    assert any("retain_graph" in mend.change for mend in finding.mends)


def test_a_card_without_kernels_gets_the_line_that_installs_them() -> None:
    event = main_event(events_in(lines(NO_KERNELS)))
    assert isinstance(event, NoKernels)
    assert event.capability == (6, 1)
    assert "cu126" in (found(NO_KERNELS).mends[0].command or "")


def test_shared_memory_is_not_the_card() -> None:
    # https://github.com/pytorch/pytorch/issues/108861
    (event,) = events_in(
        lines(
            "RuntimeError: DataLoader worker (pid 11011) is killed by signal: Bus error. It is"
            " possible that dataloader's workers are out of shared memory."
        )
    )
    assert isinstance(event, SharedMemory)

"""A log of any size, from anything that writes: bounded memory, plain text, one line of refusal."""

from __future__ import annotations

import io
import os
import random
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oom_reports import BACKWARD_TWICE, CHILD_FAILED, INTERLEAVED, NAN, NANOCHAT, REPORTS, TIMEOUT

from snugpt.errors import BadQuestionError
from snugpt.planner.doctor import reading
from snugpt.planner.doctor.examine import examine, examine_text
from snugpt.planner.doctor.messages import events_in
from snugpt.planner.doctor.reading import read_log, read_stream
from snugpt.planner.doctor.report import OutOfMemory
from snugpt.units import MIB

MESSAGE = REPORTS["2.3"].text


def texts(raw: bytes) -> list[str]:
    return [line.text for line in read_stream(io.BytesIO(raw)).lines]


def test_terminal_codes_and_control_characters_are_gone() -> None:
    coloured = b"\x1b[31;1merror\x1b[0m \x1b]0;title\x07\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\"
    (line,) = texts(coloured + b" a\x00b\x07c\x7f\xe2\x80\xaed\xc2\x9b31m\te")
    assert line == "error link abcd31m e"


def test_line_ends_of_every_system_are_the_same() -> None:
    assert texts(b"a\r\nb\nc\rd\n\n") == ["a", "b", "c", "d"]


def test_a_progress_bar_s_rewritten_line_is_many_lines() -> None:
    assert texts(b" 1%|x |\r 2%|xx|\rloss: nan\n")[-1] == "loss: nan"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_powershell_writes_is_read_too(encoding: str, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_bytes(f"step 3\n{MESSAGE}\n".encode(encoding))
    assert read_log(log).lines[0].text == "step 3"
    assert len(events_in(read_log(log).lines)) == 1


def test_a_log_in_another_alphabet_s_bytes_is_text() -> None:
    raw = "显存不够用了\n".encode("gbk") + MESSAGE.encode()
    assert len(events_in(read_stream(io.BytesIO(raw)).lines)) == 1


def test_a_traceback_in_one_line_of_json_is_split() -> None:
    trace = f'Traceback (most recent call last):\\n  File \\"t.py\\", line 3, in f\\n{MESSAGE}'
    raw = ('{"log": "' + trace + '\\n"}').encode()
    (event,) = events_in(read_stream(io.BytesIO(raw)).lines)
    assert isinstance(event, OutOfMemory)
    assert event.tried_bytes == 22 * MIB
    assert event.line == 2


def test_a_rank_s_prefix_is_taken_off_and_kept() -> None:
    first, second, third = read_stream(
        io.BytesIO(b"[rank3]: a\n[default12]:b\n[80746] [rank0]:[E321 x] c")
    ).lines
    assert (first, second) == (("a", 3), ("b", 12))
    assert (third.rank, third.text) == (0, "[E321 x] c")


def _refused(path: Path, *words: str) -> None:
    with pytest.raises(BadQuestionError) as refusal:
        examine(path)
    assert "\n" not in refusal.value.message
    assert refusal.value.hint
    for word in words:
        assert word in refusal.value.message


def test_what_is_no_log_is_refused_by_name(tmp_path: Path) -> None:
    _refused(tmp_path / "none.log", "none.log", "No such file")
    _refused(tmp_path, "folder")
    _refused(Path("zero\0byte"))
    _refused(Path("x" * 5000))
    (tmp_path / "empty").write_bytes(b" \n\n\t\r\n")
    _refused(tmp_path / "empty", "empty")
    (tmp_path / "noise").write_bytes(random.Random(1).randbytes(200_000))
    _refused(tmp_path / "noise", "not text")
    (tmp_path / "zeros").write_bytes(bytes(4096) + b"a")
    _refused(tmp_path / "zeros", "not text")
    (tmp_path / "log.gz").write_bytes(b"\x1f\x8b\x08rest")
    _refused(tmp_path / "log.gz", "gzip")
    os.mkfifo(tmp_path / "pipe")
    _refused(tmp_path / "pipe", "not a file")


def _large_log(path: Path, middle: bytes, size: int) -> None:
    """A log of `size` bytes with `middle` in the middle."""
    line = (
        b"step 00012/05000 (0.24%) | loss: 3.212345 | lrm: 1.00 | dt: 350.12ms | tok/sec: 1,000\n"
    )
    with path.open("wb") as file:
        block = line * (MIB // len(line))
        while file.tell() < size // 2:
            file.write(block)
        file.write(middle)
        while file.tell() < size:
            file.write(block)


def test_of_a_large_log_the_head_the_tail_and_every_failure_between_is_kept(
    tmp_path: Path,
) -> None:
    log = tmp_path / "large.log"
    _large_log(log, b"the line before\n" + MESSAGE.encode() + b"\n", 16 * MIB)
    shares: list[float] = []
    text = read_log(log, shares.append)
    assert not text.whole
    assert text.num_bytes >= 16 * MIB
    assert sum(len(line.text) for line in text.lines) < 4 * MIB
    assert len(events_in(text.lines)) == 1
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert "head" in " ".join(examine(log).notes)


def test_a_marker_across_two_chunks_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("WHOLE", 500), ("HEAD", 100), ("TAIL", 100), ("CHUNK", 64)):
        monkeypatch.setattr(reading, f"{name}_BYTES", size)
    monkeypatch.setattr(reading, "WINDOW_BYTES", 700)
    for shift in range(70):
        log = tmp_path / "run.log"
        log.write_bytes(b"." * (2000 + shift) + b"\n" + MESSAGE.encode() + b"\n" + b"y\n" * 900)
        (event,) = events_in(read_log(log).lines)
        assert event.line > 0


def test_a_pipe_keeps_its_head_and_its_tail() -> None:
    raw = b"first\n" + (b"a" * 99 + b"\n") * 50_000 + MESSAGE.encode()
    text = read_stream(io.BytesIO(raw))
    assert text.lines[0].text == "first"
    assert not text.whole
    assert sum(len(line.text) for line in text.lines) < 3.1 * MIB
    assert len(events_in(text.lines)) == 1


PIECES = [
    *(report.text for report in REPORTS.values()), INTERLEAVED, CHILD_FAILED, TIMEOUT, NAN,
    BACKWARD_TWICE, NANOCHAT, "GPU: NVIDIA H100 80GB HBM3 | Peak FLOPS (BF16): 9.89e+14\n",
    "argv  snugpt train --depth 12 --gpu rtx-4090 --device-batch-size 8\n", "run   ../../etc\n",
    "Overriding: depth = -3\n", "Overriding: max_seq_len = 99999999999999999999\n",
    "Tokens / micro-batch / rank: 0 x 0 = 0\n", "Tokens / micro-batch: 0\n",
    "Total batch size 0 => gradient accumulation steps: 0\n", "Vocab size: 0\n",
    "tokens per iteration will be: 1\n", "python train.py --batch_size=0 --lr=nan '",
    "torchrun --nproc_per_node=9999 -m scripts.base_train -- --depth=1e9 --fp8\n",
    "Overriding config with x:\nn_layer = 0\nn_head = 7\nbatch_size = 3.5\n",
    "python t.py --per_device_train_batch_size 7 --gradient_accumulation_steps x\n", "\\\n" * 60,
]  # fmt: skip


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """The log with a few bytes lost, changed, doubled, or its numbers made absurd."""
    log = bytearray(raw)
    for _ in range(chance.randrange(24)):
        at = chance.randrange(len(log) + 1)
        kind = chance.randrange(5)
        numbers = [found.span() for found in re.finditer(rb"\d+", bytes(log))]
        if kind == 0:
            del log[at : at + chance.randrange(30)]
        elif kind == 1:
            log[at:at] = log[at : at + chance.randrange(60)]
        elif kind == 2:
            log[at : at + 1] = chance.randbytes(1)
        elif kind == 3:
            log[at:at] = b"\n"
        elif numbers:
            start, end = chance.choice(numbers)
            log[start:end] = b"%d" % chance.choice([0, 1, 7, 10**9, 10**18, 10**30])
    return bytes(log)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(PIECES) | st.binary(max_size=80), max_size=5),
    st.integers(0, 2**32),
    st.sampled_from([None, None, "rtx-4090", "t4"]),
)
@example(["python x --batch_size=4; rm -rf ~\n", PIECES[0]], 0, None)
def test_no_log_is_met_with_more_than_a_line_of_refusal(
    parts: list[str | bytes], seed: int, gpu: str | None
) -> None:
    raw = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
    if seed % 4:
        raw = damaged(raw, random.Random(seed))
    refused: BadQuestionError | None = None
    try:
        finding = examine_text(read_stream(io.BytesIO(raw)), "fuzz", None, gpu)
    except BadQuestionError as error:
        refused = error
    if refused is not None:
        assert "\n" not in refused.message
        return
    said = [finding.happened, finding.held, finding.why, *finding.notes]
    said += [mend.change for mend in finding.mends]
    said += [mend.command or "" for mend in finding.mends]
    assert all(text.isprintable() for text in said)
    assert finding.recognised == bool(finding.happened)
    assert "; rm" not in " ".join(said)


def test_words_from_a_log_are_quoted_again() -> None:
    raw = b"python train.py --batch_size=4 --name='$(reboot)' --x=`id`\n" + MESSAGE.encode()
    finding = examine_text(read_stream(io.BytesIO(raw)), "run.log")
    commands = [
        mend.command for mend in finding.mends if mend.command and "train.py" in mend.command
    ]
    assert commands
    for command in commands:
        assert "'--name=$(reboot)'" in command
        assert "'--x=`id`'" in command


def test_a_hostile_line_takes_no_time() -> None:
    import time

    hostile = [
        b"a=b " * 2000 + b"python x.py --y",
        b"loss " * 4000 + b"nan",
        b"Tried to allocate " * 3000 + b"CUDA out of memory",
        b"step " * 2000 + b"9" * 4000,
        b"[rank" * 5000,
        b"Process 1 has 1 GiB memory in use. " * 2000 + b"CUDA out of memory",
    ]
    started_s = time.process_time()
    for line in hostile:
        examine_text(read_stream(io.BytesIO((line + b"\n") * 20)), "hostile")
    assert time.process_time() - started_s < 5

"""The ledger file: whatever kills a writer, earlier lines stay whole."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from snugpt.errors import FailedError
from snugpt.ledger.store import LEDGER_NAME, append, read_all
from snugpt.spec.measurement import Measurement

Make = Callable[..., Measurement]


def _no_warning(line: str) -> None:
    raise AssertionError(line)


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def test_what_is_appended_is_read_back_in_order(tmp_path: Path, make_measurement: Make) -> None:
    written = [make_measurement(id=f"id-{number}", steps=number) for number in range(3)]
    for measurement in written:
        assert append(tmp_path / "new" / "folder", measurement).name == LEDGER_NAME
    assert read_all(tmp_path / "new" / "folder", _no_warning) == written


def test_a_folder_without_a_ledger_has_no_measurements(tmp_path: Path) -> None:
    assert read_all(tmp_path, _no_warning) == []


def test_a_torn_last_line_is_skipped_and_the_next_one_is_whole(
    tmp_path: Path, make_measurement: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = (make_measurement(id=f"id-{number}") for number in range(3))
    append(tmp_path, first)
    path = append(tmp_path, second)
    path.write_bytes(path.read_bytes()[:-40])
    assert read_all(tmp_path) == [first]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "line 2 skipped" in warning
    append(tmp_path, third)
    assert read_all(tmp_path, lambda line: None) == [first, third]


def test_damage_anywhere_costs_only_its_own_line(tmp_path: Path, make_measurement: Make) -> None:
    measurement = make_measurement()
    path = append(tmp_path, measurement)
    line = path.read_bytes()
    path.write_bytes(b"\xff\xfe\n" + line + b"[1]\n" + line.replace(b'"fit"', b'"won"') + line)
    warnings: list[str] = []
    assert read_all(tmp_path, warnings.append) == [measurement, measurement]
    for number, warning in zip((1, 3, 4), warnings, strict=True):
        assert f"line {number} skipped" in warning


def test_concurrent_appends_lose_and_mix_nothing(tmp_path: Path, make_measurement: Make) -> None:
    def write(writer: int) -> None:
        for number in range(40):
            # Longer than a page, so that a write in parts would show.
            append(tmp_path, make_measurement(id=f"{writer}-{number}", argv=("x" * 9000,)))

    children = [_fork(lambda writer=writer: write(writer)) for writer in range(4)]  # type: ignore[misc]
    for child in children:
        os.waitpid(child, 0)
    found = sorted(measurement.id for measurement in read_all(tmp_path, _no_warning))
    assert found == sorted(f"{writer}-{number}" for writer in range(4) for number in range(40))


def test_a_killed_writer_damages_no_earlier_line(tmp_path: Path, make_measurement: Make) -> None:
    for round_number in range(5):
        append(tmp_path, make_measurement(id=f"parent-{round_number}"))
        readable, announce = os.pipe()

        def write(announce: int = announce) -> None:
            while True:
                append(tmp_path, make_measurement(id="child", argv=("x" * 9000,)))
                os.write(announce, b".")

        child = _fork(write)
        os.read(readable, 1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(readable)
        os.close(announce)
    found = [measurement.id for measurement in read_all(tmp_path, lambda line: None)]
    assert [name for name in found if name != "child"] == [f"parent-{n}" for n in range(5)]
    assert found.count("child") >= 5


def test_the_look_for_a_torn_line_and_the_write_are_one_act(
    tmp_path: Path, make_measurement: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between them no other process gets the lock."""
    refused = []

    def look(descriptor: int) -> bytes:
        with (tmp_path / LEDGER_NAME).open() as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(descriptor)
        return b""

    monkeypatch.setattr("snugpt.ledger.store._separator", look)
    append(tmp_path, make_measurement())
    assert len(refused) == 1


def test_a_full_disk_is_one_line_with_a_hint_and_earlier_lines_stay(
    tmp_path: Path, make_measurement: Make
) -> None:
    first = make_measurement()
    path = append(tmp_path, first)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, before[1]))
    try:
        with pytest.raises(FailedError, match="no space left") as caught:
            append(tmp_path, make_measurement(id="second"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.hint is not None
    assert read_all(tmp_path, lambda line: None) == [first]


def test_a_ledger_that_can_not_be_made_is_an_error(tmp_path: Path, make_measurement: Make) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedError, match="could not write"):
        append(tmp_path / "file", make_measurement())


def test_keys_of_a_later_version_are_ignored(
    tmp_path: Path, make_measurement: Make, make_estimate: Callable[..., object]
) -> None:
    measurement = make_measurement(predicted=make_estimate(100))
    path = append(tmp_path, measurement)
    text = path.read_text()
    newer = text.replace('{"schema"', '{"colour":"red","schema"', 1)
    newer = newer.replace('"requested_bytes"', '"colour":[1],"requested_bytes"', 1)
    newer = newer.replace('"formula"', '"colour":{},"formula"')
    assert newer.count("colour") == 3
    path.write_text(newer)
    assert read_all(tmp_path, _no_warning) == [measurement]

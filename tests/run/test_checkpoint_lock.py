"""One run has one writer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tiny_training import exit_code_of, fork

from snugpt.errors import FailedError
from snugpt.run.run_lock import run_lock


def test_second_writer_is_refused_with_the_number_of_the_first(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(FailedError, match=f"process {os.getppid()} is writing") as caught:
            run_lock(tmp_path).__enter__()
        assert caught.value.hint == f"ps -fp {os.getppid()}"
        assert "\n" not in caught.value.message

    with run_lock(tmp_path):
        assert exit_code_of(fork(second)) == 0


def test_lock_is_free_again_after_the_block(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"):
        pass
    with run_lock(tmp_path / "run"):
        pass


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    def hold_and_die() -> None:
        run_lock(tmp_path).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code_of(fork(hold_and_die)) == -signal.SIGKILL
    with run_lock(tmp_path):
        pass


def test_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedError, match="could not lock"):
        run_lock(tmp_path / "file").__enter__()

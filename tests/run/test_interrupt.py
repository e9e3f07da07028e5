"""Signals wait for the training loop to ask; a second Ctrl-C does not."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from tiny_training import exit_code_of, fork

from snugpt.run.interrupt import Interrupt


def in_a_child(work) -> None:
    assert exit_code_of(fork(work)) == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signal_only_sets_the_flag(name: str) -> None:
    def work() -> None:
        with Interrupt() as interrupt:
            assert interrupt.requested is None
            os.kill(os.getpid(), signal.Signals[name])
            assert interrupt.requested == name

    in_a_child(work)


def test_second_ctrl_c_stops_at_once() -> None:
    def work() -> None:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupt.requested == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    in_a_child(work)


def test_repeated_sigterm_and_one_ctrl_c_stay_a_flag() -> None:
    def work() -> None:
        with Interrupt() as interrupt:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert interrupt.requested == "SIGTERM"

    in_a_child(work)


def test_former_handlers_return_also_after_an_error() -> None:
    def work() -> None:
        received = []
        signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with pytest.raises(ZeroDivisionError), Interrupt():
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]

    in_a_child(work)


def test_other_threads_get_an_inert_one() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with Interrupt() as interrupt:
            seen.append((interrupt.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]

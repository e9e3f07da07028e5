"""Ctrl-C and SIGTERM as a question the training loop asks between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While it is entered, SIGINT and SIGTERM set a flag and nothing else.

    `requested` is the name of the first signal received ("SIGINT", "SIGTERM") or None. A second
    SIGINT raises KeyboardInterrupt where the program stands. On exit the former handlers return.
    Python lets only the main thread handle signals: in any other one this does nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._presses = 0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            # None stands for a handler that was not set from Python and can't be set from it
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Saving here could run inside another save; the loop does it where the state is whole.
        self.requested = self.requested or signal.Signals(number).name
        if number == signal.SIGINT:
            self._presses += 1
            if self._presses > 1:
                raise KeyboardInterrupt

"""Being asked to stop: Ctrl-C, and the SIGTERM of a machine that is wanted elsewhere."""

import signal
import threading
import time
from types import FrameType
from typing import Any

_ONE_REQUEST = 0.5
"""Seconds in which signals count as one: a terminal and torchrun both pass a Ctrl-C on."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and did so after the update, with a checkpoint written.

    Attributes:
        status: what the program should exit with, 128 and the number of the signal, as a shell does it: 130 after
            Ctrl-C, 143 after SIGTERM.
        step: updates done.
    """

    def __init__(self, number: int, step: int, saved: str) -> None:
        self.status, self.step = 128 + number, step
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}{saved}")


class Signals:
    """Keeps SIGINT and SIGTERM until the loop asks. A second Ctrl-C raises KeyboardInterrupt at once.

    Only the main thread may; and a signal that is ignored (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._at = number, now
            # The workers of a loader may have been sent it too; torch would raise in the middle of the update.
            self._before.setdefault(signal.SIGCHLD, signal.getsignal(signal.SIGCHLD))
            signal.signal(signal.SIGCHLD, lambda *_: None)
        elif number == signal.SIGINT and now - self._at > _ONE_REQUEST:
            raise KeyboardInterrupt

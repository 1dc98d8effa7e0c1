"""Stopping on Ctrl-C, and on the SIGTERM that a cluster sends before it takes a machine away."""

import signal
import threading
import time
from types import FrameType
from typing import Any

_SAME_REQUEST = 0.5
"""Signals within so many seconds count as one: a terminal and torchrun both forward a Ctrl-C."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped training. The current update is complete and a checkpoint is written.

    Attributes:
        status: the exit status for the program, 128 plus the number of the signal, as in a shell: 130 after
            Ctrl-C, 143 after SIGTERM.
        step: the optimizer steps done.
    """

    def __init__(self, number: int, step: int, saved: str) -> None:
        self.status, self.step = 128 + number, step
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}{saved}")


class SignalHandler:
    """Records SIGINT and SIGTERM until the training loop checks `received`. A second Ctrl-C raises immediately.

    Python allows signal handlers in the main thread only. A signal that is ignored (nohup) stays ignored.

    Attributes:
        received: the number of the first signal, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
            # The loader's workers may have received it too and exit. torch's SIGCHLD handler would then raise in
            # the middle of the update.
            self._previous.setdefault(signal.SIGCHLD, signal.getsignal(signal.SIGCHLD))
            signal.signal(signal.SIGCHLD, lambda *_: None)
        elif number == signal.SIGINT and now - self._received_at > _SAME_REQUEST:
            raise KeyboardInterrupt

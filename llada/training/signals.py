"""Asking a run to stop: SIGTERM, SIGINT and SIGUSR1 only set a flag; the loop stops at a step
boundary with a checkpoint.

Standard library only, so that the handlers can be installed before the slow imports: a signal
during start-up must not kill a run that could have ended in order.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether, and by which signal, the run was asked to stop. Repeated signals change nothing."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def install(self) -> StopRequest:
        """Handle the stop signals from now on (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self.note)
        return self

    def close(self) -> None:
        """Ignore the stop signals from now on: the process ends, and while Python does, a repeated
        one would kill it.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        self.signal = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal is not None

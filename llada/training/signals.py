"""Asking a run to stop: SIGTERM, SIGINT and SIGUSR1 only set a flag.

The loop reads it and stops at a step boundary with a checkpoint. Standard library only, so that the
handlers are installed before the slow imports: a signal during start-up must not kill a run that
could have stopped cleanly.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """True once the run was asked to stop. Repeated signals change nothing.

    Attributes:
        signal: name of the last stop signal; None: there was none.
    """

    def __init__(self) -> None:
        self.signal: str | None = None

    def install(self) -> StopRequest:
        """Handle the stop signals from now on (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self.handle)
        return self

    def close(self) -> None:
        """Ignore the stop signals from now on.

        While Python shuts down it takes the handlers away, and a repeated signal would kill it.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Take a signal; the handler that `install` sets."""
        self.signal = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal is not None

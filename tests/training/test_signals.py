"""Signals only ask; and while Python ends, a repeated one does not kill."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from llada.training.signals import STOP_SIGNALS

CODE = """
import os, signal, sys
from llada.training.signals import StopRequest
stop = StopRequest().install()
os.kill(os.getpid(), int(sys.argv[1]))
assert stop and stop.signal == signal.Signals(int(sys.argv[1])).name
if sys.argv[2] == "close":
    stop.close()
class Late:
    def __del__(self):
        # as the module goes, when Python has taken its own handlers away
        os.kill(os.getpid(), int(sys.argv[1]))
late = Late()
late.itself = late
sys.exit(75)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_a_signal_at_the_very_end_changes_no_exit_code(number: int) -> None:
    assert (
        subprocess.run(
            [sys.executable, "-c", CODE, str(int(number)), "close"], timeout=30
        ).returncode
        == 75
    )

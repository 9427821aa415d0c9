"""`python -m launch.job.main RUN/launch/NNNN [--local]`: the batch script of a job.

It runs in the folder of the code snapshot. The signal handlers are installed before the other
imports, which take seconds on a slow file system.
"""

from __future__ import annotations

import os
import signal
import sys

from llada.training.signals import StopRequest


def main() -> int:
    """Run the supervisor; returns the exit code of the job."""
    stop = StopRequest().install()
    launch_folder, *options = sys.argv[1:]
    local = "--local" in options
    if local:
        # Closing the terminal stops the run, too.
        signal.signal(signal.SIGHUP, stop.handle)
    # The batch script sets this if a signal came before this process could handle it.
    if os.environ.pop("LLADA_SIGNALLED", None):
        stop.signal = "SIGUSR1"
    from pathlib import Path

    from launch.job.supervisor import Supervisor

    return Supervisor(Path(launch_folder), stop, local).run()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m launch.job.main RUN/launch/NNNN [--local]`, in the folder of the code: the batch
script of a job.

Its signal handlers stand before anything else is imported: on a slow file system that takes
seconds.
"""

from __future__ import annotations

import os
import signal
import sys

from llada.training.signals import StopRequest


def main() -> int:
    """Exit code of the job."""
    stop = StopRequest().install()
    folder, *rest = sys.argv[1:]
    local = "--local" in rest
    if local:
        signal.signal(signal.SIGHUP, stop.handle)  # its terminal was closed
    if os.environ.pop("LLADA_SIGNALLED", None):  # by the batch script, before this process stood
        stop.signal = "SIGUSR1"
    from pathlib import Path

    from launch.job.supervisor import Supervisor

    return Supervisor(Path(folder), stop, local).run()


if __name__ == "__main__":
    sys.exit(main())

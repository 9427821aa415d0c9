"""The kind of a failure, as data: a rank reports it to the process that started it.

The message on the console is for people; the launcher decides by the kind. Standard library only.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Literal

FailureKind = Literal[
    "user_error",
    "step",
    "hang",
    "lost_peer",
    "killed",
    "exception",
    "preflight",
    "absent",
    "lost_node",
    "late_stop",
    "vanished",
    "supervisor",
]
"""What failed.

Of one rank:
    user_error: a user error; the same start ends the same way.
    step: the numbers of a step stopped the run; the same step gives the same numbers again.
    hang: no step finished in time.
    lost_peer: a connection to another rank broke, which is where the cause lies.
    killed: a signal ended the rank.
    exception: anything else.

Of a whole start:
    preflight: the tests of the nodes failed.
    absent: ranks did not start.
    lost_node: Slurm no longer reaches a node of the job.
    late_stop: ranks that were asked to stop did not in time.
    vanished: ranks ended without leaving a record.
    supervisor: the supervisor of the job itself failed.
"""

REPORT_VARIABLE = "LLADA_FAILURE_FILE"
"""Environment variable with the path of the file that a rank writes its kind to."""


def report(kind: FailureKind) -> None:
    """Tell the process that started this rank why it is about to fail; without one, do nothing."""
    path = os.environ.get(REPORT_VARIABLE)
    if not path:
        return
    # The report explains an end; it must not change its exit code.
    with suppress(OSError), open(path, "w", encoding="utf-8") as file:
        file.write(kind)

"""A failure as data: a rank reports its kind to the process that started it.

The message on the console is for people; the launcher decides by the kind. Standard library only.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

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
    lost_peer: an exchange with other ranks failed; the cause usually lies with one of them.
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
"""Environment variable with the path of the file that a rank writes its report to."""


class Report(NamedTuple):
    """What a rank says about its failure.

    Attributes:
        kind: kind of the failure.
        step: number of the training step that failed, from 1; None: it was not a step.
    """

    kind: FailureKind
    step: int | None = None


def report(kind: FailureKind, step: int | None = None) -> None:
    """Tell the process that started this rank why it is about to fail; without one, do nothing."""
    path = os.environ.get(REPORT_VARIABLE)
    if not path:
        return
    # The report explains an end; it must not change its exit code.
    with suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(Report(kind, step)._asdict(), file)


def read_report(path: Path) -> Report | None:
    """Read what a rank reported; None: it reported nothing, or was ended while it wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        report = Report(**content)
    except (OSError, ValueError, TypeError):
        return None
    if report.kind not in get_args(FailureKind):
        return None
    return report


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error means that an exchange with other ranks failed.

    Gloo raises a plain RuntimeError when a peer is gone, which no type tells from others.
    """
    if isinstance(error, ConnectionError):
        return True
    # Without torch in this process, the error cannot be one of its own.
    distributed = sys.modules.get("torch.distributed")
    names = ("DistBackendError", "DistNetworkError")
    types = tuple(getattr(distributed, name) for name in names if hasattr(distributed, name))
    return isinstance(error, types)

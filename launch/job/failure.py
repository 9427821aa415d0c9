"""Why ranks failed: the kind, which decides about a restart, and the reason that people read.

Standard library only.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from llada import exits
from llada.failures import FailureKind

CLEAN_EXITS = (exits.FINISHED, exits.RESTART)
"""Exit codes of a rank that exited because all ranks agreed to."""

_LOST_PEER = re.compile(
    r"connection (was )?(reset|closed|refused|aborted)|broken pipe|remote process"
    r" exited|ncclRemoteError|NCCL communicator was aborted"
    r"|socket timeout|pair closure|recvValue failed|sendBytes failed|failed to recv|client socket"
    r" has timed out",
    re.IGNORECASE,
)
"""What gloo, NCCL and torch's store print in a rank whose peer is gone. None of them has error
codes, so only this kind has to be recognized by its message.
"""


class Failure(NamedTuple):
    """Why an attempt failed.

    Attributes:
        kind: kind of the failure, for decisions.
        reason: human-readable reason, one line.
    """

    kind: FailureKind
    reason: str


def classify(
    code: int, message: str | None, reported: FailureKind | None = None
) -> FailureKind | None:
    """Return the kind of a rank's failure; None: the rank exited cleanly.

    Args:
        code: exit code, or minus the signal.
        message: last line of the rank's log that says why it ended; None: no line does.
        reported: kind that the rank itself reported; None: it reported nothing.
    """
    message = message or ""
    # A broken connection is a symptom, whatever ended the rank after it.
    if code not in CLEAN_EXITS and _LOST_PEER.search(message):
        return "lost_peer"
    if code < 0:
        return "killed"
    if reported is not None:
        return reported
    if code in CLEAN_EXITS:
        return None
    if code == exits.USER_ERROR:
        return "user_error"
    return "exception"

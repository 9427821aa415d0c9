"""Why ranks failed: the kind, by which restarts are decided, and the words that people read.

Standard library only.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from llada.failures import FailureKind

EXIT_USER_ERROR = 2
EXIT_RESTART = 75
"""Exit code of a rank or job that stopped in order: the same command continues."""
CLEAN_EXITS = (0, EXIT_RESTART)
"""Exit codes of a rank that ended because all of them agreed to."""

_LOST_PEER = re.compile(
    r"connection (was )?(reset|closed|refused|aborted)|broken pipe|remote process"
    r" exited|ncclRemoteError|NCCL communicator was aborted"
    r"|socket timeout|pair closure|recvValue failed|sendBytes failed|failed to recv|client socket"
    r" has timed out",
    re.IGNORECASE,
)
"""What gloo, NCCL and torch's store print in a rank whose peer is gone. They have no error codes,
so this is the one place where a kind is told from words.
"""
_STEP_FAILED = re.compile(r"failed: step \d+: ")
_HANG = re.compile(r"failed: hang: ")


class Failure(NamedTuple):
    """Why an attempt failed.

    Attributes:
        kind: for decisions.
        reason: for people, in one line.
    """

    kind: FailureKind
    reason: str


def classify(
    code: int, message: str | None, reported: FailureKind | None = None
) -> FailureKind | None:
    """Return the kind of a rank's failure; None: it ended in order.

    Args:
        code: exit code, or minus the signal.
        message: the last line of its log that says why.
        reported: the kind that the rank itself reported.
    """
    message = message or ""
    # A broken connection is a symptom, whatever ended the rank after it.
    if code not in CLEAN_EXITS and _LOST_PEER.search(message):
        return "lost_peer"
    if code < 0:
        return "killed"
    if reported is not None:
        return reported
    # A snapshot of older code reports nothing.
    if _HANG.match(message):
        return "hang"
    if code in CLEAN_EXITS:
        return None
    if code == EXIT_USER_ERROR:
        return "user_error"
    if _STEP_FAILED.match(message):
        return "step"
    return "exception"

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
"""What gloo, NCCL and torch's store print in a rank whose peer is gone. It counts only for a rank
that reported nothing: gloo raises a plain RuntimeError, and an abort leaves no time for a report.
"""


class Failure(NamedTuple):
    """Why an attempt failed.

    Attributes:
        kind: kind of the failure, for decisions.
        reason: human-readable reason, one line.
        key: what failed, without measured numbers: equal keys mean the same failure, which recurs
            as long as nothing changes. None: the failure may not recur.
    """

    kind: FailureKind
    reason: str
    key: str | None = None


def step_key(step: int) -> str:
    """Return the key of a failure in the numbers of a training step."""
    return f"step {step}"


def preflight_key(failed_tests: set[tuple[str, str]]) -> str:
    """Return the key of a failure of the node tests.

    Args:
        failed_tests: pairs of a node and the test that failed there.
    """
    pairs = [f"{node}:{test}" for node, test in sorted(failed_tests)]
    return " ".join(["preflight", *pairs])


def classify(
    code: int, message: str | None, reported: FailureKind | None = None
) -> FailureKind | None:
    """Return the kind of a rank's failure; None: the rank exited cleanly.

    Args:
        code: exit code, or minus the signal.
        message: last line of the rank's log that says why it ended; None: no line does.
        reported: kind that the rank itself reported; None: it reported nothing.
    """
    # A broken connection is a symptom, whatever ended the rank after it.
    if reported == "lost_peer" and code not in CLEAN_EXITS:
        return "lost_peer"
    if code >= 0 and reported is not None:
        return reported
    if code in CLEAN_EXITS:
        return None
    if code == exits.USER_ERROR:
        return "user_error"
    if reported is None and _LOST_PEER.search(message or ""):
        return "lost_peer"
    if code < 0:
        return "killed"
    return "exception"

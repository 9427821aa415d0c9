"""What becomes of a run when its ranks have ended: nothing here asks anyone or changes anything."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.job.attempt import StepEnd
from launch.job.spec import Restarts

USER_ERROR, AGAIN = 2, 75
_LONGEST_BACKOFF = 3600.0
_ASKED = (-2, -9, -10, -15)
"""Ends of a rank that a stop explains: SIGINT, SIGKILL, SIGUSR1, SIGTERM."""

_ENDS = ("finished", "requeued", "stopped", "cancelled", "failed")

JobState = Literal["running", "cancelled", "lost", "requeued", "unknown"]
"""What Slurm is doing with the job at the end of its ranks ("lost": ends it since a node is gone);
on this machine "running".
"""


@dataclass(frozen=True)
class Situation:
    """What a decision depends on besides how the ranks ended.

    Attributes:
        signal: by which the job was asked to stop; None: it was not.
        wanted: the user asked for an end, not for a restart.
        state: what Slurm is doing with the job.
        progress: this attempt left a new checkpoint.
        failures: attempts in a row before this one that failed without a new checkpoint.
        last: why the attempt before failed.
        unreachable: nodes of the job that Slurm counts as gone.
    """

    signal: str | None = None
    wanted: bool = False
    state: JobState = "running"
    progress: bool = False
    failures: int = 0
    last: str | None = None
    unreachable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Decision:
    """What to do.

    Attributes:
        event: name of the event: finished, requeued, stopped, cancelled, failed.
        reason: in words.
        failure: it counts as one.
        delay: seconds before the next start.
        exclude: nodes that the next start avoids.
        code: exit code of the job.
        by_slurm: Slurm starts the job again, there is nothing to do.
    """

    event: Literal["finished", "requeued", "stopped", "cancelled", "failed"]
    reason: str
    failure: bool = False
    delay: float = 0.0
    exclude: list[str] = field(default_factory=list)
    code: int = AGAIN
    by_slurm: bool = False


def decide(end: StepEnd, now: Situation, limits: Restarts) -> Decision:
    """What becomes of a run whose ranks ended so."""
    if end.finished:
        return Decision("finished", "", code=0)
    failure = end.first_failure
    if now.state == "cancelled":
        return Decision("cancelled", "cancelled with scancel, which is final", code=1)
    if now.state == "requeued":
        gone = f"; it does not reach {', '.join(now.unreachable)}" if now.unreachable else ""
        return Decision(
            "requeued",
            f"Slurm puts the job back into the queue{gone}",
            failure=bool(gone),
            by_slurm=True,
        )
    if failure is not None and failure.code == USER_ERROR:
        return Decision("failed", str(failure), failure=True, code=USER_ERROR)
    orderly = failure is None or failure.code in _ASKED
    if now.wanted and orderly:
        return Decision("stopped", "as asked with `llada stop`")
    if end.killed and now.signal and orderly and not now.progress:
        late = (
            f"{now.signal}: not stopped in time, so the ranks were ended; signal_seconds of the"
            " profile may be too short"
        )
        return restart(late, [], now, limits)
    if now.signal and now.state != "lost" and orderly and not end.absent:
        return Decision(
            "requeued",
            (
                f"{now.signal}: stopped with a checkpoint"
                if now.progress
                else f"{now.signal}: stopped"
            ),
        )
    reason = describe(end, now.unreachable)
    if now.wanted:
        return Decision(
            "stopped", f"as asked with `llada stop`, after a failure: {reason}", failure=True
        )
    # Where no node has a rank, the nodes are not to blame.
    return restart(reason, [] if len(end.absent) == len(end.hosts) else end.absent, now, limits)


def restart(reason: str, exclude: list[str], now: Situation, limits: Restarts) -> Decision:
    """Whether there is another try after a failure."""
    failures = 1 if now.progress else now.failures + 1
    if failures > limits.limit:
        many = (
            f"{failures} failures in a row without a new checkpoint, and requeue.limit is"
            f" {limits.limit}; the last: {reason}"
        )
        return Decision(
            "failed", many if limits.limit else reason, failure=True, code=1, exclude=exclude
        )
    if (
        not now.progress
        and now.last == reason
        and not exclude
        and (": step " in reason or reason.startswith("preflight: "))
    ):
        return Decision(
            "failed",
            f"twice the same, so a third time would not differ: {reason}",
            failure=True,
            code=1,
            exclude=exclude,
        )
    # A node that is avoided from now on needs no time to recover.
    delay = 0.0 if exclude else min(limits.backoff * 2 ** (failures - 1), _LONGEST_BACKOFF)
    return Decision("requeued", reason, failure=True, delay=delay, exclude=exclude)


def describe(end: StepEnd, unreachable: list[str]) -> str:
    """Why ranks ended, in a line."""
    if end.absent:
        reason = f"no rank started on {', '.join(end.absent)}"
        return f"{reason} ({end.launcher[1]})" if end.launcher[1] else reason
    gone = f"; Slurm does not reach {', '.join(unreachable)}" if unreachable else ""
    failure = end.first_failure
    if failure is not None and failure.blames_another and gone:
        return f"{gone.removeprefix('; ')}; {failure}"
    if failure is not None:
        return f"{failure}{gone}"
    hang = next((one for one in end.exits if one.message and "hang" in one.message), None)
    if hang is not None:
        return f"{hang}{gone}"
    missing = sorted(set(range(end.ranks)) - {one.rank for one in end.exits})
    if missing:
        names = ", ".join(str(rank) for rank in missing[:8]) + (", ..." if len(missing) > 8 else "")
        code, line = end.launcher
        if code < 0:
            line = f"the process that started the ranks was killed by {signal.Signals(-code).name}"
        said = f" ({line})" if line else ""
        return f"rank {names}: gone without a word{said}{gone}"
    return f"every rank left to be started again, none says why{gone}"


def this_launch(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events since the run was submitted last."""
    return events[
        max((i for i, line in enumerate(events) if line["event"] == "submitted"), default=0) :
    ]


def failures_in_a_row(
    events: list[dict[str, Any]], attempt: int, task: int | None = None
) -> tuple[int, str | None]:
    """How many attempts of this launch failed in a row without a new checkpoint before `attempt`,
    and why the last of them did.

    An attempt that ended without a word (its node was lost) failed; one that was stopped or
    requeued in order did not, and ends no row.
    """
    own = [line for line in this_launch(events) if line.get("task") == task]
    count, last = 0, None
    for number in range(attempt - 1, 0, -1):
        lines = [line for line in own if line.get("attempt") == number]
        ends = [line for line in lines if line["event"] in _ENDS]
        if not lines or (ends and ends[-1]["event"] != "requeued"):
            break  # before that the user launched it anew
        if not ends or ends[-1].get("failure"):
            count += 1
            last = last or (ends[-1]["reason"] if ends else "ended without a word")
        if any(line["event"] == "checkpoint" for line in lines):
            break  # the row begins in this attempt
    return count, last

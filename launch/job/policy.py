"""Decides how a run continues after its ranks have ended.

Pure functions, without I/O. Decisions depend on exit codes, signals and kinds of failures, never on
the wording of a message. Standard library only.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.job.bad_nodes import Verdict
from launch.job.failure import Failure, preflight_key
from launch.job.records import AttemptEnd, RankExit
from launch.job.spec import Restarts
from llada import exits
from llada.events import ATTEMPT_END_EVENTS, Event, since_submission
from llada.failures import FailureKind

_LONGEST_BACKOFF = 3600.0
"""Seconds."""
_STOP_EXITS = (-signal.SIGINT, -signal.SIGKILL, -signal.SIGUSR1, -signal.SIGTERM)
"""Exit codes of a rank that the request to stop explains."""
_NAMED_RANKS = 8
"""Number of ranks that a reason names."""
_NO_RECORD = {"reason": "ended without a record"}
"""Stands for the event of an attempt that left none."""

DecisionEvent = Literal["finished", "requeued", "stopped", "cancelled", "failed"]
"""One of `llada.events.ATTEMPT_END_EVENTS`."""

JobState = Literal["running", "cancelled", "lost", "requeued", "unknown"]
"""What Slurm is doing with the job when its ranks have ended; "running" without Slurm. A "lost" job
is being ended because one of its nodes is gone.
"""


@dataclass(frozen=True)
class Situation:
    """What a decision depends on besides how the ranks ended.

    Attributes:
        signal: signal that asked the job to stop; None: no signal did.
        stopped_by_user: whether the user asked the run to end, not to restart.
        state: what Slurm is doing with the job.
        progress: whether this attempt left a new checkpoint.
        failures: number of attempts just before this one that failed without a new checkpoint.
        last_reason: reason of the latest of these failures; None: no failures.
        last_key: key of the latest of these failures (see `Failure`); None: it has none.
        unreachable: nodes of the job that Slurm cannot reach.
    """

    signal: str | None = None
    stopped_by_user: bool = False
    state: JobState = "running"
    progress: bool = False
    failures: int = 0
    last_reason: str | None = None
    last_key: str | None = None
    unreachable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Decision:
    """How the run continues.

    Attributes:
        event: name of the event that ends the attempt.
        reason: human-readable reason.
        kind: kind of the failure; None: the attempt is not a failure.
        key: key of the failure (see `Failure`); None: it has none.
        delay: seconds before the next start.
        exclude: nodes that the next start avoids.
        code: exit code of the job.
        by_slurm: whether Slurm is requeueing the job already, so that nothing is left to do.
    """

    event: DecisionEvent
    reason: str
    kind: FailureKind | None = None
    key: str | None = None
    delay: float = 0.0
    exclude: list[str] = field(default_factory=list)
    code: int = exits.RESTART
    by_slurm: bool = False

    @property
    def failure(self) -> bool:
        """Whether the attempt counts as a failure."""
        return self.kind is not None


def decide(end: AttemptEnd, now: Situation, limits: Restarts) -> Decision:
    """Decide how the run continues."""
    if end.finished:
        return Decision("finished", "", code=0)
    # What Slurm has decided comes first: it cannot be undone.
    if now.state == "cancelled":
        return Decision("cancelled", "cancelled with scancel, which is final", code=1)
    if now.state == "requeued":
        return _requeued_by_slurm(now)
    first = end.first_failure
    if first is not None and first.code == exits.USER_ERROR:
        return Decision("failed", str(first), kind="user_error", code=exits.USER_ERROR)
    no_rank_crashed = first is None or first.code in _STOP_EXITS
    if no_rank_crashed and now.stopped_by_user:
        return Decision("stopped", "requested with `llada stop`")
    if no_rank_crashed and now.signal:
        if end.killed and not now.progress:
            late = (
                f"{now.signal}: the ranks did not stop in time and were killed; signal_seconds of"
                " the profile may be too short"
            )
            return restart(Failure("late_stop", late), [], now, limits)
        # A lost node, or a host without ranks, is a failure even if the other ranks stopped.
        if now.state != "lost" and not end.absent:
            outcome = "stopped"
            if now.progress:
                outcome = "stopped with a checkpoint"
            return Decision("requeued", f"{now.signal}: {outcome}")
    failure = explain(end, now.unreachable)
    if now.stopped_by_user:
        reason = f"requested with `llada stop`, after a failure: {failure.reason}"
        return Decision("stopped", reason, failure.kind, failure.key)
    exclude = end.absent
    if len(end.absent) == len(end.hosts):
        # If no rank started on any node, the nodes are not to blame.
        exclude = []
    return restart(failure, exclude, now, limits)


def _requeued_by_slurm(now: Situation) -> Decision:
    reason = "Slurm requeues the job"
    if not now.unreachable:
        return Decision("requeued", reason, by_slurm=True)
    reason = f"{reason}; it cannot reach {', '.join(now.unreachable)}"
    return Decision("requeued", reason, kind="lost_node", by_slurm=True)


def restart(failure: Failure, exclude: list[str], now: Situation, limits: Restarts) -> Decision:
    """Decide whether there is another attempt after a failure, and when.

    The back-off doubles: with `backoff` 60, the starts after failures 1, 2, 3 in a row wait 60,
    120 and 240 seconds. A new checkpoint starts the count again.
    """
    failures = now.failures + 1
    if now.progress:
        failures = 1
    if failures > limits.limit:
        reason = failure.reason
        if limits.limit:
            reason = (
                f"{failures} failures in a row without a new checkpoint, and requeue.limit is"
                f" {limits.limit}; the last: {reason}"
            )
        return Decision("failed", reason, failure.kind, failure.key, exclude=exclude, code=1)
    # A failure without a key equals no other.
    is_repeated = failure.key is not None and now.last_key == failure.key
    if is_repeated and not now.progress and not exclude:
        reason = (
            f"the same failure twice in a row, so another attempt would not help: {failure.reason}"
        )
        return Decision("failed", reason, failure.kind, failure.key, code=1)
    delay = min(limits.backoff * 2 ** (failures - 1), _LONGEST_BACKOFF)
    if exclude:
        # The bad nodes are excluded, so there is nothing to wait for.
        delay = 0.0
    return Decision(
        "requeued", failure.reason, failure.kind, failure.key, delay=delay, exclude=exclude
    )


def explain(end: AttemptEnd, unreachable: list[str]) -> Failure:
    """Name the failure that ended the ranks."""
    if end.absent:
        reason = f"no rank started on {', '.join(end.absent)}"
        if end.launcher_line:
            reason = f"{reason} ({end.launcher_line})"
        return Failure("absent", reason)
    lost_nodes = ""
    if unreachable:
        lost_nodes = f"Slurm cannot reach {', '.join(unreachable)}"
    first = end.first_failure
    if first is not None and first.blames_another and lost_nodes:
        # The ranks of the lost node could not leave a record.
        return Failure("lost_node", f"{lost_nodes}; {first}")
    failure = _explain_ranks(end, first)
    if lost_nodes:
        return failure._replace(reason=f"{failure.reason}; {lost_nodes}")
    return failure


def explain_verdict(verdict: Verdict, hosts: list[str]) -> tuple[Failure, list[str]] | None:
    """Name the failure that the node tests found; None: all nodes passed.

    Args:
        verdict: result of the tests.
        hosts: hosts of the job.

    Returns:
        The failure, and the nodes that the next start avoids.
    """
    if verdict.problem is not None:
        return verdict.problem._replace(reason=f"preflight: {verdict.problem.reason}"), []
    if not verdict.bad:
        return None
    reason = "; ".join(f"{host}: {fault.why}" for host, fault in verdict.bad.items())
    exclude = list(verdict.bad)
    most_are_bad = len(hosts) > 1 and len(verdict.bad) * 2 > len(hosts)
    if most_are_bad:
        # The profile may ask for something that the nodes do not have.
        reason = f"{reason}; that is most of the nodes, so none is excluded"
        exclude = []
    key = preflight_key({(host, fault.test) for host, fault in verdict.bad.items()})
    return Failure("preflight", f"preflight: {reason}", key), exclude


def _explain_ranks(end: AttemptEnd, first: RankExit | None) -> Failure:
    if first is not None:
        return first.failure
    # A rank that detects a hang exits with the code of a clean stop.
    for rank_exit in end.exits:
        if rank_exit.kind == "hang":
            return rank_exit.failure
    recorded = {rank_exit.rank for rank_exit in end.exits}
    missing = [rank for rank in range(end.ranks) if rank not in recorded]
    if not missing:
        return Failure("vanished", "every rank exited for a restart, and none gave a reason")
    names = ", ".join(str(rank) for rank in missing[:_NAMED_RANKS])
    if len(missing) > _NAMED_RANKS:
        names += ", ..."
    reason = f"rank {names}: disappeared without a record"
    line = end.launcher_line
    if end.launcher_code < 0:
        name = signal.Signals(-end.launcher_code).name
        line = f"the process that started the ranks was killed by {name}"
    if line:
        reason = f"{reason} ({line})"
    return Failure("vanished", reason)


@dataclass(frozen=True)
class FailuresInARow:
    """Attempts that failed one after another.

    Attributes:
        count: number of these attempts.
        last_reason: reason of the latest failure; None: no failures.
        last_key: key of the latest failure (see `Failure`); None: it has none. Events of versions
            that did not write keys have none either.
    """

    count: int
    last_reason: str | None = None
    last_key: str | None = None


def failures_in_a_row(
    events: list[dict[str, Any]], attempt: int, task: int | None = None
) -> FailuresInARow:
    """Count the attempts of the latest launch that failed in a row before `attempt`.

    The count goes back to the latest attempt that left a new checkpoint: earlier failures do not
    matter. An attempt that ended without a record (its node was lost) has failed. An attempt that
    was stopped or requeued cleanly has not, and it does not interrupt the row.

    Args:
        events: events of the run.
        attempt: number of the attempt that is about to start.
        task: number of the array task, whose own attempts count; None: the job is not an array.
    """
    own_events = [line for line in since_submission(events) if line.get("task") == task]
    failures: list[Event] = []
    for number in range(attempt - 1, 0, -1):
        lines = [line for line in own_events if line.get("attempt") == number]
        ends = [line for line in lines if line["event"] in ATTEMPT_END_EVENTS]
        is_of_this_launch = bool(lines)
        # The user then started the run again.
        ended_the_run = bool(ends) and ends[-1]["event"] != "requeued"
        if not is_of_this_launch or ended_the_run:
            break
        failed = not ends or ends[-1].get("failure", False)
        if failed:
            failures.append(ends[-1] if ends else _NO_RECORD)
        left_checkpoint = any(line["event"] == "checkpoint" for line in lines)
        if left_checkpoint:
            break
    if not failures:
        return FailuresInARow(0)
    latest = failures[0]
    return FailuresInARow(len(failures), str(latest["reason"]), latest.get("failure_key"))

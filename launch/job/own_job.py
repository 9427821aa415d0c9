"""What a supervisor asks Slurm about its own job, and asks of it. Standard library only."""

from __future__ import annotations

import os

from launch import slurm
from launch.job.policy import JobState


def job_state(job: str | None) -> JobState:
    """Find out what Slurm is doing with this process's job.

    A job that is being ended shows as COMPLETING, whatever becomes of it.

    Args:
        job: its id; None: the run is on this machine, without Slurm.
    """
    if job is None:
        return "running"
    fields = slurm.show_job(job, patience=slurm.CONTROLLER_PATIENCE)
    state = fields.get("JobState", "")
    if not state:
        return "unknown"
    if state == "RUNNING":
        return "running"
    restarts_so_far = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if int(fields.get("Restarts", "0")) > restarts_so_far:
        return "requeued"
    limit = _seconds(fields, "TimeLimit")
    over_time = _seconds(fields, "RunTime") >= limit > 0
    if state == "TIMEOUT" or (state == "COMPLETING" and over_time):
        # Not cancelled: it may be put back into the queue.
        return "running"
    return "cancelled"


def seconds_left(job: str) -> int | None:
    """Return the seconds until a job's time limit; None: it has none, or Slurm does not say."""
    fields = slurm.show_job(job)
    left = _seconds(fields, "TimeLimit") - _seconds(fields, "RunTime")
    if left <= 0:
        return None
    return left


def configure_start(job: str, delay: float, exclude: list[str] | None) -> None:
    """Tell Slurm when and where a pending job may start.

    Args:
        job: its id.
        delay: seconds from now; 0: at once.
        exclude: all nodes to avoid; None: as before.
    """
    changes = []
    if delay:
        changes.append(f"StartTime=now+{int(delay)}")
    if exclude is not None:
        # An empty list takes an earlier exclusion back.
        changes.append(f"ExcNodeList={','.join(exclude)}")
    # One by one: a refusal of one must not take the other with it.
    for change in changes:
        refusal = slurm.update(job, change)
        if refusal is not None:
            print(f"llada: Slurm refused {change} of job {job}: {refusal}", flush=True)


def latest_nodes(nodes: list[str], spare: int | None) -> list[str]:
    """Return each node once, at its latest place, and no more than can be spared.

    With 2 to spare, n1 n2 n3 n1 gives n3 n1.

    Args:
        nodes: the latest last.
        spare: nodes that the partition has beyond what the job needs; None: not known.
    """
    latest = list(dict.fromkeys(reversed(nodes)))[::-1]
    if spare is None:
        return latest
    if spare <= 0:
        return []
    return latest[-spare:]


def count_nodes_of_partition(job: str) -> int:
    """Return how many nodes the partition of a job has; 0 when Slurm does not say."""
    partition = slurm.show_job(job).get("Partition", "")
    return slurm.count_partition_nodes(partition)


def _seconds(fields: dict[str, str], name: str) -> int:
    """A duration of `scontrol show job`; 0 for none, as UNLIMITED."""
    try:
        return slurm.duration_seconds(fields.get(name, ""))
    except ValueError:
        return 0

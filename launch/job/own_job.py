"""What a supervisor asks Slurm about its own job. Standard library only."""

from __future__ import annotations

import os

from launch import slurm
from launch.job.policy import JobState


def job_state(job: str | None) -> JobState:
    """Find out what Slurm is doing with this process's job.

    Slurm shows COMPLETING for every job that is being ended, so that other fields must tell why.

    Args:
        job: id of the job; None: the run is on this machine, without Slurm.
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
    has_limit = limit > 0
    over_time = has_limit and _seconds(fields, "RunTime") >= limit
    if state == "TIMEOUT" or (state == "COMPLETING" and over_time):
        # Unlike a cancelled job, it can be requeued.
        return "running"
    return "cancelled"


def seconds_left(job: str) -> int | None:
    """Return the seconds until a job's time limit; None: no limit, or Slurm does not say."""
    fields = slurm.show_job(job)
    left = _seconds(fields, "TimeLimit") - _seconds(fields, "RunTime")
    if left <= 0:
        return None
    return left


def _seconds(fields: dict[str, str], name: str) -> int:
    """A duration that `scontrol show job` prints, in seconds; 0 for UNLIMITED and the like."""
    try:
        return slurm.duration_seconds(fields.get(name, ""))
    except ValueError:
        return 0

"""What a job tells Slurm about its next start, and about the other jobs of its chain.

Standard library only.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from launch import slurm
from launch.job.policy import Decision
from launch.job.spec import JobSpec, read_submitted
from llada import events
from llada.errors import RunError

_EXCLUSION_SECONDS = 86400.0
"""Seconds that a bad node is excluded: within a day it may have been repaired."""


class NextStart:
    """The next start of a run: of this job once more, or of the next job of its chain.

    Args:
        job: id of this job.
        spec: description of this job.
        launch_folder: RUN/launch/NNNN.
    """

    def __init__(self, job: str, spec: JobSpec, launch_folder: Path) -> None:
        self._job = job
        self._spec = spec
        self._launch_folder = launch_folder

    def requeue(self, decision: Decision) -> str | None:
        """Put this job back into the queue; returns None, or Slurm's refusal."""
        refusal = slurm.requeue(self._job)
        if refusal is None:
            self._configure([self._job], decision)
        return refusal

    def leave_to_chain(self, decision: Decision) -> str | None:
        """Let the next job of the chain continue; returns its id, or None if no job is left."""
        later_jobs = self._later_jobs()
        if not later_jobs:
            return None
        if decision.exclude:
            # No later job may run on the bad nodes.
            self._configure(later_jobs, decision)
        else:
            # Only the next job has to wait for the back-off.
            self._configure(later_jobs[:1], decision)
        return later_jobs[0]

    def end_chain(self, finished: bool) -> None:
        """Cancel the other jobs of the chain.

        Args:
            finished: the run has finished, so that the conversion after the chain can start.
        """
        submitted = read_submitted(self._launch_folder)
        # The jobs of an array are not a chain.
        if submitted is None or len(submitted.jobs) < 2 or self._spec.kind != "train":
            return
        with suppress(RunError):
            if finished and submitted.then is not None:
                # Until now it depends on the last job of the chain, which is cancelled below.
                slurm.update(submitted.then, f"Dependency=afterok:{self._job}")
            slurm.cancel(*(job for job in submitted.jobs if job != self._job))

    def _later_jobs(self) -> list[str]:
        submitted = read_submitted(self._launch_folder)
        if submitted is None or self._job not in submitted.jobs:
            return []
        own_position = submitted.jobs.index(self._job)
        return submitted.jobs[own_position + 1 :]

    def _configure(self, jobs: list[str], decision: Decision) -> None:
        """Tell Slurm when and where jobs may start."""
        exclude = None
        if decision.exclude:
            exclude = [*self._spec.exclude, *self._nodes_to_exclude(decision)]
        for job in jobs:
            _configure_start(job, decision.delay, exclude)

    def _nodes_to_exclude(self, decision: Decision) -> list[str]:
        """Return the bad nodes of the last day, but no more than the partition can spare."""
        since = time.time() - _EXCLUSION_SECONDS
        bad: list[str] = []
        for line in events.since_submission(events.read(Path(self._spec.run_folder))):
            if line["time"] > since:
                bad += line.get("excluded", [])
        bad += decision.exclude
        partition = slurm.show_job(self._job).get("Partition", "")
        nodes = slurm.count_partition_nodes(partition)
        # Slurm may not say how many nodes the partition has. All bad ones are then excluded.
        spare = None
        if nodes:
            spare = nodes - self._spec.nodes - len(self._spec.exclude)
        return latest_nodes(bad, spare)


def _configure_start(job: str, delay: float, exclude: list[str] | None) -> None:
    """Tell Slurm when and where a pending job may start.

    Args:
        job: id of the job.
        delay: seconds from now before the job may start; 0: it may start at once.
        exclude: nodes to exclude, instead of those excluded so far; None: no change.
    """
    changes = []
    if delay:
        changes.append(f"StartTime=now+{int(delay)}")
    if exclude is not None:
        # An empty list removes earlier exclusions.
        changes.append(f"ExcNodeList={','.join(exclude)}")
    # One at a time, so that Slurm cannot refuse both because of one.
    for change in changes:
        refusal = slurm.update(job, change)
        if refusal is not None:
            print(f"llada: Slurm refused {change} of job {job}: {refusal}", flush=True)


def latest_nodes(nodes: list[str], spare: int | None) -> list[str]:
    """Return the latest nodes of a list, each once, but no more than can be spared.

    With 2 to spare, n1 n2 n3 n1 gives n3 n1.

    Args:
        nodes: nodes, the latest last; may repeat.
        spare: number of nodes in the partition beyond those that the job needs; None: not known.
    """
    latest: list[str] = []
    for node in nodes:
        # A node that comes again moves to the end.
        if node in latest:
            latest.remove(node)
        latest.append(node)
    if spare is None:
        return latest
    if spare <= 0:
        return []
    return latest[-spare:]

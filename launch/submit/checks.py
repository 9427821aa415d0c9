"""Checks before a job is submitted: what would fail after hours in the queue fails now."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch import slurm
from launch.profile import ClusterProfile, minutes
from llada.config import RunConfig
from llada.data.tasks import open_data
from llada.errors import UserError, did_you_mean
from llada.outputs import require_space
from llada.planning.summary import CheckpointVolume, checkpoint_volume
from llada.training import lock
from llada.training.schedule import Schedule
from llada.training.starting.resume import preview_resume


@dataclass(frozen=True)
class RunPreview:
    """What the checks found out about a run.

    Attributes:
        data_parallel: number of replicas.
        start_step: step from which the run continues; 0: a new run.
        steps: number of steps of the run.
        checkpoints: size and number of the checkpoints.
        notes: lines for the user.
    """

    data_parallel: int
    start_step: int
    steps: int
    checkpoints: CheckpointVolume
    notes: list[str]


@dataclass(frozen=True)
class CheckOptions:
    """How strictly a run is checked.

    Attributes:
        allow_changed: whether the run may resume although settings or data changed.
        rewind: step of the checkpoint to go back to; None: the latest checkpoint.
        data_may_be_missing: whether the data may be missing because another job makes it first; the
            run itself then checks it.
        elsewhere: whether the run will be on another machine, so that a disk that is too small is
            only a note.
    """

    allow_changed: bool = False
    rewind: int | None = None
    data_may_be_missing: bool = False
    elsewhere: bool = False


def check_run(config: RunConfig, ranks: int, options: CheckOptions) -> RunPreview:
    """Check that a run can start: data, run folder, layout, disk.

    Args:
        config: config of the run.
        ranks: world size.
        options: how strictly the run is checked.

    Raises:
        UserError: the run could not start; one line that says why.
    """
    data_parallel = config.check_world(ranks)
    folder = Path(config.run.dir)
    holder = lock.describe_holder(folder)
    if holder is not None:
        raise UserError(
            f"run.dir: '{folder}' is in use by {holder}; stop that first with `llada stop"
            f" {folder}`, or choose another run.dir"
        )
    Schedule(config.schedule, config.tokens_per_step).check_covers(config.train.steps)
    start_step, notes = _preview_start(config, options)
    checkpoints = checkpoint_volume(config)
    try:
        # Two checkpoints: an old one is deleted only after the new one is complete.
        require_space(folder, 2 * checkpoints.bytes_each, "run.dir")
    except UserError as error:
        if not options.elsewhere:
            raise
        notes.append(
            f"{error}; checked on this machine only; the cluster's disk is checked at launch there"
        )
    return RunPreview(data_parallel, start_step, config.train.steps, checkpoints, notes)


def _preview_start(config: RunConfig, options: CheckOptions) -> tuple[int, list[str]]:
    """The step from which the run continues, and notes for the user."""
    if options.data_may_be_missing:
        for entry in config.data.mixture:
            if not Path(entry.path).exists():
                note = (
                    f"{entry.path} does not exist yet: data and checkpoint are checked when the job"
                    " starts"
                )
                return 0, [note]
    start = preview_resume(
        config,
        open_data(config),
        Path(config.run.dir) / "checkpoints",
        options.allow_changed,
        options.rewind,
    )
    return start.step, list(start.notes)


def check_profile(profile: ClusterProfile) -> None:
    """Compare a profile's partitions and time limits with those of the cluster.

    Asks Slurm. What the profile alone shows is checked in `ClusterProfile`.

    Raises:
        UserError: there is no such partition, or its time limit is lower.
    """
    _check_partition("", profile.partition, profile.time, profile.qos)
    # The settings that these jobs are submitted with.
    cpu_jobs = profile.complete_cpu_jobs
    time = cpu_jobs.time or profile.time
    _check_partition("cpu_jobs.", cpu_jobs.partition, time, cpu_jobs.qos)


def _check_partition(prefix: str, partition: str | None, time: str, qos: str | None) -> None:
    """Check a partition and a time limit; messages put `prefix` before the names of settings."""
    if partition is None:
        return
    limits = slurm.partitions()
    # A job may name several partitions, separated by commas; it must fit all of them here.
    for name in partition.split(","):
        if name not in limits:
            raise UserError(
                f"{prefix}partition: Slurm has no partition '{name}'{did_you_mean(name, limits)};"
                f" there are {', '.join(sorted(limits))}"
            )
        limit = limits[name]
        # A quality of service may allow more than its partition.
        if qos is not None or limit in ("infinite", "n/a"):
            continue
        if minutes(time) > minutes(limit):
            raise UserError(
                f"{prefix}time: '{time}' is over the limit {limit} of partition '{name}'; a run"
                " that needs longer restarts from its checkpoint by itself"
            )

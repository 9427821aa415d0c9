"""Checks before a job waits in a queue: everything that can be known to be wrong is refused now."""

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
from llada.training.resume import preview_resume
from llada.training.schedule import Schedule


@dataclass(frozen=True)
class RunPreview:
    """What the checks found out about a run.

    Attributes:
        data_parallel: replicas.
        start_step: from which the run continues; 0: it starts anew.
        steps: of the run.
        checkpoints: their size and number.
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
        allow_changed: resume although settings or data changed.
        rewind: step to go back to first; None: the latest checkpoint.
        data_may_be_missing: another job makes it before this one starts, so that the job itself
            checks it.
        elsewhere: the run will not be on this machine, so that too small a disk is only a note.
    """

    allow_changed: bool = False
    rewind: int | None = None
    data_may_be_missing: bool = False
    elsewhere: bool = False


def check_run(config: RunConfig, ranks: int, options: CheckOptions) -> RunPreview:
    """Check that a run can start: data, run folder, layout, disk.

    Args:
        config: of the run.
        ranks: world size.
        options: see there.

    Raises:
        UserError: it could not start, in one line.
    """
    data_parallel = config.check_world(ranks)
    folder = Path(config.run.dir)
    holder = lock.holder(folder)
    if holder is not None:
        raise UserError(
            f"run.dir: '{folder}' is in use by {holder}; stop that first with `llada stop"
            f" {folder}`, or choose another run.dir"
        )
    # Stages that end too early show at the last step.
    schedule = Schedule(config.schedule, config.tokens_per_step)
    schedule.learning_rate(config.train.steps - 1)
    start_step, notes = _preview_start(config, options)
    checkpoints = checkpoint_volume(config)
    try:
        # Two: the new one is complete before an old one is deleted.
        require_space(folder, 2 * checkpoints.bytes_each, "run.dir")
    except UserError as error:
        if not options.elsewhere:
            raise
        notes.append(
            f"{error}; on this machine, so that the cluster's disk is compared when the run is"
            " launched there"
        )
    return RunPreview(data_parallel, start_step, config.train.steps, checkpoints, notes)


def _preview_start(config: RunConfig, options: CheckOptions) -> tuple[int, list[str]]:
    """The step from which the run continues, and lines for the user."""
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

    Raises:
        UserError: no such partition, or a time limit over the partition's.
    """
    _check_partition("", profile.partition, profile.time, profile.qos)
    cpu_jobs = profile.cpu_jobs
    _check_partition("cpu_jobs.", cpu_jobs.partition, cpu_jobs.time or profile.time, profile.qos)


def _check_partition(prefix: str, partition: str | None, time: str, qos: str | None) -> None:
    """Check one partition; `prefix` is that of the settings, for messages."""
    if partition is None:
        return
    limits = slurm.partitions()
    # A job may name several; Slurm takes the first that is free.
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

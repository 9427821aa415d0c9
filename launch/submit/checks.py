"""Everything that can be known to be wrong before a job waits in a queue for it."""

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
class Checked:
    """What the checks found.

    Attributes:
        data_parallel: replicas.
        first: step from which the run goes on; 0: from the start.
        steps: of the run.
        checkpoints: their size and number.
        notes: lines for the user.
    """

    data_parallel: int
    first: int
    steps: int
    checkpoints: CheckpointVolume
    notes: list[str]


def check_run(
    config: RunConfig,
    ranks: int,
    allow_changed: bool,
    rewind: int | None = None,
    later: bool = False,
    elsewhere: bool = False,
) -> Checked:
    """Open the data, look at the run folder, and compare everything with a world of `ranks`
    processes.

    With `later`, data that is not there yet is left to the job: another one makes it first. With
    `elsewhere`, the run will not be on this machine, so that too small a disk is a note.

    Raises:
        UserError: the run could not start, in one line.
    """
    data_parallel = config.check_world(ranks)
    folder = Path(config.run.dir)
    holder = lock.holder(folder)
    if holder is not None:
        raise UserError(
            f"run.dir: '{folder}' is in use by {holder}; stop that first with `llada stop"
            f" {folder}`, or choose another run.dir"
        )
    schedule = Schedule(config.schedule, config.tokens_per_step)
    schedule.learning_rate(config.train.steps - 1)
    missing = (
        [entry.path for entry in config.data.mixture if not Path(entry.path).exists()]
        if later
        else []
    )
    if missing:
        first, notes = (
            0,
            [
                f"{missing[0]} is not there yet: data and checkpoint are compared when the job"
                " starts"
            ],
        )
    else:
        start = preview_resume(
            config, open_data(config), folder / "checkpoints", allow_changed, rewind
        )
        first, notes = start.step, start.notes
    checkpoints = checkpoint_volume(config)
    try:
        # The new one is complete before an old one is deleted.
        require_space(folder, 2 * checkpoints.bytes_each, "run.dir")
    except UserError as error:
        if not elsewhere:
            raise
        notes = [
            *notes,
            (
                f"{error}; on this machine, so that the cluster's disk is compared when the run is"
                " launched there"
            ),
        ]
    return Checked(data_parallel, first, config.train.steps, checkpoints, notes)


def check_profile(profile: ClusterProfile) -> None:
    """Compare a profile with what Slurm says of itself.

    Raises:
        UserError: no such partition, or a time limit over the partition's.
    """
    for partition, time, setting in (
        (profile.partition, profile.time, "time"),
        (profile.cpu_jobs.partition, profile.cpu_jobs.time or profile.time, "cpu_jobs.time"),
    ):
        if partition is None:
            continue
        known = slurm.partitions()
        # A job may name several; Slurm takes the first that is free.
        for name in partition.split(","):
            if name not in known:
                key = setting.replace("time", "partition")
                raise UserError(
                    f"{key}: Slurm has no partition '{name}'{did_you_mean(name, known)}; there are"
                    f" {', '.join(sorted(known))}"
                )
            limit = known[name]
            # A quality of service may allow more than its partition.
            if (
                profile.qos is None
                and limit not in ("infinite", "n/a")
                and minutes(time) > minutes(limit)
            ):
                raise UserError(
                    f"{setting}: '{time}' is over the limit {limit} of partition '{name}'; a run"
                    " that needs longer starts again from its checkpoint by itself"
                )

"""The profile of a cluster: settings of its Slurm, in a YAML file that all runs there share.

The docstrings of the settings are the table in docs/slurm.md.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from launch import slurm
from llada.config import apply_override, first_mistake, read_yaml
from llada.config.section import Section
from llada.errors import UserError

# Options of sbatch that the launcher sets itself. The profile may set others under `sbatch`.
_RESERVED_OPTIONS = {
    "time",
    "no-requeue",
    "ntasks-per-node",
    "job-name",
    "nodes",
    "ntasks",
    "array",
    "dependency",
    "output",
    "error",
    "signal",
    "open-mode",
    "chdir",
    "requeue",
}


class Container(Section):
    """The container that the ranks run in. The batch script itself runs outside."""

    kind: Literal["pyxis", "apptainer"]
    """pyxis: srun --container-image (pyxis with enroot); apptainer: `apptainer exec --nv`."""
    image: str
    """Image in the form that this kind expects (a .sqsh or .sif file, or a URI)."""
    mounts: list[str] = Field(default_factory=list)
    """SOURCE:TARGET pairs. The code, the data and the run folder must have the same paths inside
    the container as outside.
    """


class Environment(Section):
    """Software environment of a job."""

    modules: list[str] = Field(default_factory=list)
    """Environment modules, loaded in this order."""
    source: list[str] = Field(default_factory=list)
    """Shell files to source after the modules are loaded, such as an activate script."""
    variables: dict[str, str | int] = Field(default_factory=dict)
    """Environment variables of the ranks; they override those that the launcher sets (NCCL, gloo).
    """
    python: str | None = None
    """Python interpreter of the ranks; null: the one that runs `llada launch`. In a container, the
    interpreter inside it.
    """
    container: Container | None = None
    """null: no container."""


class Requeue(Section):
    """How a job restarts itself."""

    enabled: bool = True
    """false: jobs cannot requeue themselves at this site; use --chain."""
    limit: int = Field(default=3, ge=0)
    """Consecutive failures without a new checkpoint after which the run is marked FAILED. Clean
    stops never count.
    """
    backoff: float = Field(default=60.0, ge=0)
    """Seconds before the next start after a failure; doubled with every further consecutive
    failure, up to an hour.
    """
    grace: float = Field(default=120.0, gt=0)
    """Seconds that the other ranks have to exit after the first one exits cleanly; then they are
    killed.
    """
    start_timeout: float = Field(default=600.0, gt=0)
    """Seconds within which every rank must start (a container image may have to be fetched); after
    that, missing nodes are excluded.
    """


class Preflight(Section):
    """Tests of the nodes before the first step.

    A bad node is reported and excluded, and the job restarts.
    """

    enabled: bool = True
    """false: no node tests."""
    seconds: float = Field(default=120.0, gt=0)
    """Time limit, in seconds, for the ranks to connect, and for every all-reduce."""
    gpus: int | None = Field(default=None, ge=0)
    """GPUs that torch must see on a node; null: as many as ranks; 0: a cluster without GPUs."""
    min_gpu_memory_gb: float = Field(default=0.0, ge=0)
    """Minimum free memory of every GPU, GB."""
    min_disk_gb: float = Field(default=10.0, ge=0)
    """Minimum free disk space where the run writes, GB."""
    max_clock_skew: float = Field(default=5.0, gt=0)
    """Maximum difference between a node's clock and those of the others, seconds."""
    slow_factor: float = Field(default=1.5, gt=1)
    """A node whose matrix product or all-reduce is this many times slower than the median is bad.
    """
    matmul_size: int = Field(default=4096, ge=16)
    """Number of rows and columns of the matrices."""
    allreduce_mb: float = Field(default=256.0, gt=0)
    """Size of the all-reduce, MB."""


def _check_time_limit(value: object) -> object:
    """Validate a time limit before pydantic converts it.

    YAML reads 12:00:00 without quotes as a number in base 60, 43200, which Slurm would read as
    minutes.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(
            f"{value!r} is a number to YAML, even where 12:00:00 was written; put the time in"
            " quotes"
        )
    minutes(value)
    return value


class CpuJobs(Section):
    """Jobs without GPUs: data preparation and conversion."""

    partition: str | None = None
    """Partition; null: the same as for training."""
    account: str | None = None
    """Account; null: the same as for training."""
    qos: str | None = None
    """Quality of service; null: the same as for training."""
    time: str | None = None
    """Time limit; null: the same as for training."""
    cpus: int = Field(default=8, ge=1)
    """Cores per task."""
    memory_gb: float | None = Field(default=None, ge=0)
    """Memory per task, GB; null: the partition's default."""
    exclusive: bool = False
    """Do not share the nodes with other jobs: every task gets a whole node, whatever `exclusive` is
    for training.
    """

    _check_time = field_validator("time", mode="before")(_check_time_limit)


class ClusterProfile(Section):
    """How to ask a cluster's Slurm for nodes."""

    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account to charge; null: your default."""
    qos: str | None = None
    """Quality of service; null: your default."""
    time: str
    """Time limit of a job as D-HH:MM:SS, HH:MM:SS or minutes, in quotes. A longer run continues
    from its checkpoint in the next job.
    """
    signal_seconds: int = Field(default=300, ge=1, le=65535)
    """Seconds before the time limit at which the run stops with a checkpoint. Must exceed a step
    and a save; Slurm may be a minute early.
    """
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are requested: --gpus-per-node=N, --gres=gpu:N, or not at all (a cluster without
    GPUs, or whole nodes).
    """
    gpu_type: str | None = None
    """GPU type in that request, for example h100; null: any."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Cores per rank; null: the partition's default."""
    memory_per_task_gb: float | None = Field(default=None, ge=0)
    """Memory per rank, GB; 0: all of the node's; null: the partition's default."""
    constraint: str | None = None
    """Features that nodes must have (--constraint of sbatch)."""
    reservation: str | None = None
    """Reservation to run in."""
    exclusive: bool = False
    """Do not share the nodes with other jobs."""
    exclude: list[str] = Field(default_factory=list)
    """Nodes to exclude."""
    network_interface: str | None = None
    """Network interface for NCCL and gloo connections, for example ib0; null: they choose."""
    numa_binding: bool = True
    """Bind each rank to the cores near its GPU."""
    environment: Environment = Environment()
    requeue: Requeue = Requeue()
    preflight: Preflight = Preflight()
    cpu_jobs: CpuJobs = CpuJobs()
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)
    """Further options of sbatch, for example {mail-type: FAIL}; true: an option without a value."""
    srun: list[str] = Field(default_factory=list)
    """Further arguments of srun, for example [--mpi=none]."""

    _check_time = field_validator("time", mode="before")(_check_time_limit)

    @model_validator(mode="after")
    def _checks(self) -> ClusterProfile:
        # A run that is told to stop as soon as it starts would never take a step.
        if self.signal_seconds >= minutes(self.time) * 60:
            raise ValueError(
                f"signal_seconds: {self.signal_seconds} is not less than time = {self.time}"
            )
        for name in sorted(self.sbatch):
            # submitit accepts both spellings, ntasks_per_node and ntasks-per-node.
            if name.replace("_", "-") in _RESERVED_OPTIONS:
                raise ValueError(f"sbatch: {name} is set by the launcher; leave it out")
        return self

    @property
    def complete_cpu_jobs(self) -> CpuJobs:
        """The settings of jobs without GPUs, with those for training where they are null."""
        own = self.cpu_jobs
        inherited = {
            "partition": own.partition or self.partition,
            "account": own.account or self.account,
            "qos": own.qos or self.qos,
            "time": own.time or self.time,
        }
        return own.model_copy(update=inherited)


def minutes(text: str) -> int:
    """Convert Slurm's D-HH:MM:SS, D-HH, HH:MM:SS, MM:SS or MM to minutes, rounded up.

    Raises:
        ValueError: not a duration, or zero.
    """
    try:
        seconds = slurm.duration_seconds(text)
    except ValueError:
        raise ValueError(
            f"'{text}' is not a duration; write D-HH:MM:SS, HH:MM:SS or minutes"
        ) from None
    if seconds <= 0:
        raise ValueError(f"'{text}' is not allowed: it must be longer than zero")
    return math.ceil(seconds / 60)


def load_profile(path: str | Path, overrides: list[str] | None = None) -> ClusterProfile:
    """Read a profile, apply `key.sub=value` overrides and validate the result.

    Raises:
        UserError: a setting is wrong; one line that names it.
    """
    raw = read_yaml(Path(path), "--cluster")
    for override in overrides or []:
        key, _, value = override.partition("=")
        if key in ("time", "cpu_jobs.time"):
            # The shell has removed the quotes that YAML needs around a time.
            override = f'{key}="{value}"'
        apply_override(raw, override)
    try:
        return ClusterProfile.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"--cluster {path}: {first_mistake(error, ClusterProfile)}") from None

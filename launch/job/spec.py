"""The files in RUN/launch/NNNN: the job's description, and the ids of what was submitted.

Standard library only, like everything that the batch job imports.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from llada.checkpoint.names import checkpoint_step, committed_checkpoints
from llada.types import JsonObject

LAUNCH_FOLDER = "launch"
JOB_FILE = "job.json"
"""The job's description."""
SUBMITTED_FILE = "submitted.json"
"""The ids of what was submitted."""
STOP_FILE = "stop"
"""Made by `llada stop`: the run is to end, and not to restart."""


@dataclass(frozen=True)
class Restarts:
    """When a job restarts itself.

    Attributes:
        requeue: whether the job may requeue itself; if not, the run ends with the job, or the next
            job of a chain continues it.
        limit: failures in a row without a new checkpoint after which the run has failed.
        backoff: seconds before the restart after a first failure; doubled with every further one,
            up to an hour.
        grace: seconds that the other ranks have to exit after the first one exited cleanly.
        start_timeout: seconds in which every rank has to start.
        reserve: seconds before the time limit at which ranks that are still running are killed, so
            that the job can still be requeued.
    """

    requeue: bool = True
    limit: int = 3
    backoff: float = 60.0
    grace: float = 120.0
    start_timeout: float = 600.0
    reserve: float = 60.0


@dataclass(frozen=True)
class JobSpec:
    """A job of a run. The fields are the keys of job.json.

    The launch that writes the file also takes the snapshot of the code that reads it.

    Attributes:
        kind: "train": ranks on all nodes; "task": a single command, for a task of a job array or a
            conversion.
        run_folder: folder with the events, the logs and launch/.
        directory: folder where the user launched the run; relative paths of the config start here.
        code: snapshot of the code.
        command: arguments of `llada`; {task} stands for the number of the array task.
        python: Python interpreter of the ranks.
        container: command that runs the ranks in a container; empty without one.
        first_start_arguments: further arguments of `llada` until the first step is done. Going back
            to an earlier checkpoint is one: it must happen only once.
        nodes, tasks_per_node: size of a "train" job.
        environment: environment variables of every rank.
        srun: further options of srun.
        bind: whether ranks are bound to the cores near their GPU.
        ignore_early_signals: whether ranks ignore stop signals until they handle them; if not, an
            early signal ends them.
        preflight: settings of the node tests, named as in `launch.profile.Preflight`; None: no
            tests.
        exclude: nodes that the user excluded.
        array: whether the job is a task of a job array.
        chain: number of jobs that were submitted to follow each other.
        restarts: when the job restarts itself.
    """

    kind: Literal["train", "task"]
    run_folder: str
    directory: str
    code: str
    command: list[str]
    python: str
    container: list[str] = field(default_factory=list)
    first_start_arguments: list[str] = field(default_factory=list)
    nodes: int = 1
    tasks_per_node: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    srun: list[str] = field(default_factory=list)
    bind: bool = True
    ignore_early_signals: bool = True
    preflight: dict[str, float] | None = None
    exclude: list[str] = field(default_factory=list)
    array: bool = False
    chain: int = 1
    restarts: Restarts = field(default_factory=Restarts)

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, launch_folder: Path) -> JobSpec:
        """Read the description in RUN/launch/NNNN."""
        content = json.loads((launch_folder / JOB_FILE).read_text(encoding="utf-8"))
        return cls(**{**content, "restarts": Restarts(**content["restarts"])})


@dataclass(frozen=True)
class Submitted:
    """What `llada launch` submitted. The fields are the keys of submitted.json.

    Attributes:
        jobs: ids of the Slurm jobs, one per task of an array; empty for a run on this machine.
        then: id of the job that waits for the run to finish; None: no such job.
    """

    jobs: list[str]
    then: str | None = None

    @property
    def all_jobs(self) -> list[str]:
        if self.then is None:
            return self.jobs
        return [*self.jobs, self.then]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def launch_folders(run_folder: Path) -> list[Path]:
    """Return RUN/launch/NNNN of every launch of a run, oldest first."""
    return sorted(path for path in (run_folder / LAUNCH_FOLDER).glob("[0-9]*") if path.is_dir())


def read_submitted(launch_folder: Path) -> Submitted | None:
    """Return what a launch submitted; None if it was interrupted before it submitted anything."""
    try:
        content = json.loads((launch_folder / SUBMITTED_FILE).read_text(encoding="utf-8"))
        return Submitted(**content)
    except (OSError, ValueError, TypeError):
        return None


def make_numbered_folder(parent: Path, pattern: str = "{:04d}") -> tuple[int, Path]:
    """Make the folder with the next number, from 1; returns the number and the folder."""
    parent.mkdir(parents=True, exist_ok=True)
    # "attempt-0012" -> "0012". Other names, such as "job-17.log", end in no number.
    suffixes = [path.name.rpartition("-")[2] for path in parent.iterdir()]
    number = 1 + max((int(suffix) for suffix in suffixes if suffix.isdigit()), default=0)
    while True:
        folder = parent / pattern.format(number)
        try:
            folder.mkdir()
            return number, folder
        except FileExistsError:
            # Another process has just made it.
            number += 1


def latest_checkpoint(run_folder: Path) -> int:
    """Return the step of the latest complete checkpoint of a run; 0: no checkpoint."""
    try:
        checkpoints = committed_checkpoints(run_folder / "checkpoints")
    except OSError:
        # An event and a status contain this number, and neither may fail for lack of it.
        return 0
    if not checkpoints:
        return 0
    return checkpoint_step(checkpoints[-1])


def read_record(path: Path) -> JsonObject | None:
    """Read a small JSON file; None if it is missing, torn or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    return content

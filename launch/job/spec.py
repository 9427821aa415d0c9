"""The files in RUN/launch/NNNN: what the launcher tells the job, and what it submitted.

Standard library only, like everything that the batch job imports.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

LAUNCH_FOLDER = "launch"
JOB_FILE = "job.json"
"""The job's description."""
SUBMITTED_FILE = "submitted.json"
"""The ids of what was submitted."""
STOP_FILE = "stop"
"""Exists once the user wants the run to end, not to restart."""

JsonObject = dict[str, object]


@dataclass(frozen=True)
class Restarts:
    """When a job starts itself again.

    Attributes:
        requeue: whether it may; otherwise the run ends with the job, or the next job of a chain
            continues it.
        limit: failures in a row without a new checkpoint after which the run is left failed.
        backoff: seconds before the start after a first failure; doubled with every further one, an
            hour at most.
        grace: seconds that the other ranks have to end after the first one ended in order.
        start_timeout: seconds in which every rank has to start.
        reserve: seconds before the time limit at which ranks that have not stopped are ended, so
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
    """A job of a run, as job.json holds it: the fields are the file's keys.

    Attributes:
        kind: "train": ranks over all nodes; "task": one command, of a job array or a conversion.
        state: folder with events, logs and launch/ (the run's own).
        directory: where the user started it; relative paths of the config refer to it.
        code: snapshot of the code.
        command: words of the llada command; {task} stands for the number of the array task.
        python: the interpreter.
        container: words that lead into the container that the ranks run in, if any.
        first: further words of the command until a first step is done, since going back to an
            earlier checkpoint happens once.
        nodes, tasks_per_node: size of a "train" job.
        environment: variables of every rank.
        srun: further words of srun.
        bind: bind ranks to the cores near their GPU.
        quiet: the ranks ignore stop signals until they handle them; otherwise the signals end
            them.
        preflight: settings of the node tests, with the numbers of `launch.profile.Preflight`;
            None: no tests.
        exclude: nodes that the user excluded.
        array: the job is one task of a job array.
        chain: number of jobs that were submitted to follow each other.
        restarts: when the job starts itself again.
    """

    kind: Literal["train", "task"]
    state: str
    directory: str
    code: str
    command: list[str]
    python: str
    container: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    nodes: int = 1
    tasks_per_node: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    srun: list[str] = field(default_factory=list)
    bind: bool = True
    quiet: bool = True
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
    """What `llada launch` started, as submitted.json holds it.

    Attributes:
        jobs: ids of Slurm; one for each task of an array; empty for a run on this machine.
        then: id of the job that waits for the run to finish; None: there is none.
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


def launch_folders(state: Path) -> list[Path]:
    """Return RUN/launch/NNNN of every launch of a run, oldest first."""
    return sorted(path for path in (state / LAUNCH_FOLDER).glob("[0-9]*") if path.is_dir())


def read_submitted(launch_folder: Path) -> Submitted | None:
    """Return what a launch submitted; None when it was interrupted before that."""
    try:
        content = json.loads((launch_folder / SUBMITTED_FILE).read_text(encoding="utf-8"))
        return Submitted(**content)
    except (OSError, ValueError, TypeError):
        return None


def make_numbered_folder(parent: Path, pattern: str = "{:04d}") -> tuple[int, Path]:
    """Make the folder with the next number, counting from 1; returns the number and the folder."""
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
            # Another process was faster.
            number += 1


def latest_checkpoint(state: Path) -> int:
    """Return the step of the latest complete checkpoint of a run; 0: there is none."""
    markers = (state / "checkpoints").glob("step_*/COMMITTED")
    # "step_00000020.rewound-1" was set aside and does not count.
    suffixes = [marker.parent.name.removeprefix("step_") for marker in markers]
    return max((int(suffix) for suffix in suffixes if suffix.isdigit()), default=0)


def read_record(path: Path) -> JsonObject | None:
    """Read a small JSON file; None when it is missing, torn or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    return content

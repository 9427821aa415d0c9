"""What the launcher tells the job: RUN/launch/NNNN/job.json. Standard library only, as all that the
batch job imports.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FOLDER = "launch"
JOB, SUBMITTED, STOP = "job.json", "submitted.json", "stop"
"""The job's description; what was submitted (ids); whose existence says that the user wants an end,
not a restart.
"""


@dataclass(frozen=True)
class Restarts:
    """When a job starts itself again.

    Attributes:
        requeue: whether it may; else its end is the end, or a chain's next job goes on.
        limit: failures in a row without a new checkpoint after which it does not.
        backoff: seconds before the start after a first failure; doubled with every further one, an
            hour at most.
        grace: seconds that the other ranks have to end after the first has ended in order.
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
    """A job of a run.

    Attributes:
        kind: "train": ranks over all nodes; "task": one command, of a job array or a conversion.
        state: folder with events, logs and launch/ (that of the run).
        directory: where the user started it: relative paths of the config are meant from there.
        code: snapshot of the code.
        command: words of the llada command; {task} is the number of the array task.
        python: the interpreter.
        container: words that lead into the container that the ranks run in, if any.
        first: words of the command until a first step is done: going back to an earlier checkpoint
            happens once.
        nodes, tasks_per_node: of "train".
        environment: variables of every rank.
        srun: further words of srun.
        bind: bind ranks to the cores near their GPU.
        quiet: the ranks handle the stop signals themselves once they can; else these end them.
        preflight: what the nodes are tested for; None: nothing.
        exclude: nodes that the user excluded.
        array: the job is an array, and this one of its tasks.
        chain: jobs that were submitted to follow each other.
        restarts: see there.
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
    preflight: dict[str, Any] | None = None
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
    def read(cls, folder: Path) -> JobSpec:
        """The description in RUN/launch/NNNN."""
        content = json.loads((folder / JOB).read_text(encoding="utf-8"))
        return cls(**{**content, "restarts": Restarts(**content["restarts"])})


@dataclass(frozen=True)
class Submitted:
    """What `llada launch` started.

    Attributes:
        jobs: ids of Slurm; of an array one for each task; empty for a run of this machine.
        then: id of the job that waits for the end; None: there is none.
    """

    jobs: list[str]
    then: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def launches(state: Path) -> list[Path]:
    """RUN/launch/NNNN of every launch of a run, oldest first."""
    return sorted(path for path in (state / FOLDER).glob("[0-9]*") if path.is_dir())


def submitted(folder: Path) -> Submitted | None:
    """What a launch submitted; None when it was cut off before that."""
    try:
        return Submitted(**json.loads((folder / SUBMITTED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def next_folder(parent: Path, pattern: str = "{:04d}") -> tuple[int, Path]:
    """Make the next numbered folder; its number, from 1."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1 + max(
        (
            int(digits)
            for path in parent.iterdir()
            if (digits := path.name.rpartition("-")[2]).isdigit()
        ),
        default=0,
    )
    while True:
        folder = parent / pattern.format(number)
        try:
            folder.mkdir()
            return number, folder
        except FileExistsError:  # another process was faster
            number += 1


def latest_checkpoint(state: Path) -> int:
    """Steps of the latest complete checkpoint of a run; 0: there is none."""
    found = [path.parent.name for path in (state / "checkpoints").glob("step_*/COMMITTED")]
    return max(
        (int(digits) for name in found if (digits := name.removeprefix("step_")).isdigit()),
        default=0,
    )


def read_record(path: Path) -> dict[str, Any] | None:
    """A small JSON file that is there whole or not at all."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_record(path: Path, text: str) -> None:
    """Write such a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

"""What is known about an attempt's ranks: the records that their parents wrote, and srun's output.

Standard library only.
"""

from __future__ import annotations

import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.job.failure import CLEAN_EXITS, Failure, step_key
from launch.job.spec import read_record
from llada.failures import FailureKind

_STARTUP_SECONDS = 120.0
"""Seconds after the start of an attempt during which the folder is read more often."""
_STARTUP_LOOK_SECONDS = 0.5
"""Seconds between two looks at the folder during that time."""
LOOK_SECONDS = 3.0
"""Seconds between two looks at a shared folder. A run lasts weeks, so the file server must not be
asked more often.
"""
_TASK_ENDED = re.compile(r"srun: error: \S+: tasks? (?P<tasks>[\d,-]+): (?P<how>.*)")
"""srun's line about tasks that failed."""
_LONGEST_LINE = 500
_ENDED_BY_OTHERS = (-signal.SIGABRT, -signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1)
"""Exit codes of a rank that was ended from outside: NCCL aborts a process whose peer is gone, and
torchrun sends SIGTERM to the other ranks when one has failed.
"""


@dataclass(frozen=True)
class RankStart:
    """A rank that started.

    Attributes:
        rank: number of the rank.
        host: host it runs on.
        pid: id of its parent process on that host.
        step: number of the Slurm job step; None without Slurm.
    """

    rank: int
    host: str
    pid: int
    step: str | None = None


@dataclass(frozen=True)
class RankExit:
    """How a rank ended.

    Attributes:
        rank: number of the rank.
        host: host it ran on.
        time: time of the end, seconds since 1970.
        code: exit code, or minus the signal.
        message: last line of its log that says why it ended; None: no line does.
        parent_end: how its parent process ended, if it ended without writing a record; None: the
            parent wrote the record.
        kind: kind of its failure; None: it exited cleanly.
        training_step: number of the training step whose numbers stopped it, from 1; None: it was
            not stopped by a step.
    """

    rank: int
    host: str
    time: float
    code: int
    message: str | None
    parent_end: str | None = None
    kind: FailureKind | None = None
    training_step: int | None = None

    @property
    def failure(self) -> Failure:
        """The failure of a rank that did not exit cleanly."""
        key = None
        if self.kind == "step" and self.training_step is not None:
            key = step_key(self.training_step)
        return Failure(self.kind or "exception", str(self), key)

    @property
    def blames_another(self) -> bool:
        """Whether it lost its connection to another rank, or was ended from outside."""
        return self.code in _ENDED_BY_OTHERS or self.kind == "lost_peer"

    def __str__(self) -> str:
        if self.parent_end is not None:
            how = (
                f"killed together with its parent process ({self.parent_end}); running out of"
                " memory can cause this"
            )
        elif self.code < 0:
            how = f"killed by {signal.Signals(-self.code).name}"
        elif self.message:
            how = self.message.removeprefix("failed: ")
        else:
            how = f"exit code {self.code}"
        return f"rank {self.rank} on {self.host}: {how}"


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt, one start of all ranks, ended.

    Attributes:
        exits: how the ranks ended, the first to end first.
        ranks: number of ranks that were to start.
        hosts: hosts on which they were to start.
        absent: hosts on which not every rank started.
        killed: whether the supervisor killed ranks that did not end by themselves.
        launcher_code: exit code of srun or torchrun, or minus the signal.
        launcher_line: last line that srun or torchrun printed.
    """

    exits: list[RankExit]
    ranks: int
    hosts: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    killed: bool = False
    launcher_code: int = 0
    launcher_line: str = ""

    @property
    def finished(self) -> bool:
        all_have_exited = len(self.exits) == self.ranks
        return all_have_exited and all(rank_exit.code == 0 for rank_exit in self.exits)

    @property
    def first_failure(self) -> RankExit | None:
        """The first rank that did not exit cleanly.

        A rank that only lost its connection to another comes after the one that crashed, whatever
        the clocks of their hosts say.
        """
        failed = [rank_exit for rank_exit in self.exits if rank_exit.code not in CLEAN_EXITS]
        return min(failed, key=lambda failure: (failure.blames_another, failure.time), default=None)


class RankRecords:
    """The records in an attempt's folder. Each file is read once.

    Args:
        folder: folder of the attempt.
        ranks: number of ranks that were to start.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder = folder
        self._ranks = ranks
        self._starts: dict[int, RankStart] = {}
        self._exits: dict[int, RankExit] = {}
        self._created = time.monotonic()
        self._next_look = 0.0

    @property
    def all_started(self) -> bool:
        return len(self._starts) == self._ranks

    @property
    def starts(self) -> list[RankStart]:
        """The ranks that started, by number."""
        return [self._starts[rank] for rank in sorted(self._starts)]

    @property
    def exits(self) -> list[RankExit]:
        """The ranks that ended, the first to end first."""
        return sorted(self._exits.values(), key=lambda rank_exit: rank_exit.time)

    def refresh(self, now: bool = False) -> bool:
        """Read new records if a look is due, or at once with `now`; returns whether it looked."""
        clock = time.monotonic()
        if clock < self._next_look and not now:
            return False
        pause = LOOK_SECONDS
        if clock - self._created < _STARTUP_SECONDS:
            pause = _STARTUP_LOOK_SECONDS
        self._next_look = clock + pause
        for path in self._folder.glob("rank_*.json"):
            self._read(path)
        return True

    def _read(self, path: Path) -> None:
        # rank_00003.start.json or rank_00003.exit.json; the node tests write further files.
        name, event = path.name.split(".")[:2]
        rank = int(name.removeprefix("rank_"))
        if event == "start" and rank not in self._starts:
            record = read_record(path)
            if record is not None:
                self._starts[rank] = _rank_start(rank, record)
        elif event == "exit" and rank not in self._exits:
            record = read_record(path)
            if record is not None:
                self._exits[rank] = _rank_exit(rank, record)


def _rank_start(rank: int, record: dict[str, Any]) -> RankStart:
    return RankStart(rank, record["host"], record["pid"], record.get("step"))


def _rank_exit(rank: int, record: dict[str, Any]) -> RankExit:
    code: int = record["code"]
    message: str | None = record["message"]
    return RankExit(
        rank,
        record["host"],
        record["time"],
        code,
        message,
        kind=record["kind"],
        # Only a rank that reported a step has it.
        training_step=record.get("training_step"),
    )


# -- what srun prints ------------------------------------------------------------------------------


def ended_tasks(launcher_log: str) -> dict[int, str]:
    """Return the tasks that failed according to srun, with its explanation.

    "srun: error: n2: tasks 2,4-5: Killed" gives {2: "srun: Killed", 4: ..., 5: ...}.
    """
    ended: dict[int, str] = {}
    for line in _TASK_ENDED.finditer(launcher_log):
        how = f"srun: {line['how'].strip()}"
        for part in line["tasks"].split(","):
            first, _, last = part.partition("-")
            for task in range(int(first), int(last or first) + 1):
                ended[task] = how
    return ended


def reports_ended_task(launcher_log: str) -> bool:
    """Return whether srun printed that a task failed."""
    return _TASK_ENDED.search(launcher_log) is not None


def last_launcher_line(log: str) -> str:
    """Return the last line of srun or torchrun that says more than that a task ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if not lines:
        return ""
    for line in reversed(lines):
        is_ruler = not line.strip("=-*")
        is_task_end = _TASK_ENDED.search(line) is not None or "Terminated StepId" in line
        if not is_ruler and not is_task_end:
            return line[:_LONGEST_LINE]
    return lines[-1][:_LONGEST_LINE]


def read_log(path: Path) -> str:
    """Return the text of a log; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

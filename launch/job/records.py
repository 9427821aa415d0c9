"""What is known of an attempt's ranks: the records that their parents wrote, and srun's output.

Standard library only.
"""

from __future__ import annotations

import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.job.failure import CLEAN_EXITS, classify
from launch.job.spec import read_record
from llada.failures import FailureKind

_OFTEN_SECONDS = 0.5
LOOK_SECONDS = 3.0
"""Between two looks at a shared folder, whose file server has to answer for weeks."""
_STARTUP_SECONDS = 120.0
"""After the start of an attempt, in which the records are looked for more often."""
_TASK_ENDED = re.compile(r"srun: error: \S+: tasks? (?P<tasks>[\d,-]+): (?P<how>.*)")
"""srun's line about tasks that did not end well."""
_ENDED_BY_OTHERS = (-signal.SIGABRT, -signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1)
"""NCCL aborts a process whose peer is gone; torchrun sends SIGTERM to the other ranks when one has
failed.
"""


@dataclass(frozen=True)
class RankStart:
    """A rank that started.

    Attributes:
        rank, host: which and where.
        pid: of its parent process, on that host.
        step: number of Slurm's job step; None without Slurm.
    """

    rank: int
    host: str
    pid: int
    step: str | None = None


@dataclass(frozen=True)
class RankExit:
    """How a rank ended.

    Attributes:
        rank, host: which and where.
        time: of the end, seconds since 1970.
        code: exit code, or minus the signal.
        message: the last line of its log that says why.
        parent_end: what is known of the end of its parent process, where that ended too and left no
            record; None: the parent wrote the record.
        kind: of its failure; None: it ended in order.
    """

    rank: int
    host: str
    time: float
    code: int
    message: str | None
    parent_end: str | None = None
    kind: FailureKind | None = None

    @property
    def blames_another(self) -> bool:
        """Whether it ended because another rank was gone, or was made to end."""
        return self.code in _ENDED_BY_OTHERS or self.kind == "lost_peer"

    def __str__(self) -> str:
        if self.parent_end is not None:
            how = (
                f"killed together with its parent process ({self.parent_end}); running out of"
                " memory can cause this"
            )
        elif self.code < 0:
            how = f"killed by {signal.Signals(-self.code).name}"
        else:
            how = (self.message or f"exit code {self.code}").removeprefix("failed: ")
        return f"rank {self.rank} on {self.host}: {how}"


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt, one start of all ranks, ended.

    Attributes:
        exits: of the ranks that ended by themselves or by a signal, in the order of their ends.
        ranks: how many there should have been.
        hosts: where they should have been.
        absent: those of `hosts` on which not every rank started.
        killed: ranks were killed because they did not end by themselves.
        launcher_code: exit code of srun or torchrun, or minus the signal.
        launcher_line: its last line.
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
        return len(self.exits) == self.ranks and all(rank.code == 0 for rank in self.exits)

    @property
    def first_failure(self) -> RankExit | None:
        """The first rank that did not end in order.

        A rank that only noticed that another was gone comes after that one, whatever the clocks of
        their hosts say.
        """
        failed = [rank for rank in self.exits if rank.code not in CLEAN_EXITS]
        return min(failed, key=lambda rank: (rank.blames_another, rank.time), default=None)


class RankRecords:
    """The records in an attempt's folder. Each file is read once.

    Args:
        folder: of the attempt.
        ranks: how many there should be.
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
        """The ranks that started, in their order."""
        return [self._starts[rank] for rank in sorted(self._starts)]

    @property
    def exits(self) -> list[RankExit]:
        """The ranks that ended, the first one first."""
        return sorted(self._exits.values(), key=lambda rank: rank.time)

    def refresh(self, now: bool = False) -> bool:
        """Read new records if it is time to look, or at once with `now`; returns whether it did."""
        clock = time.monotonic()
        if clock < self._next_look and not now:
            return False
        pause = LOOK_SECONDS
        if clock - self._created < _STARTUP_SECONDS:
            pause = _OFTEN_SECONDS
        self._next_look = clock + pause
        for path in self._folder.glob("rank_*.json"):
            self._read(path)
        return True

    def _read(self, path: Path) -> None:
        # rank_00003.start.json or rank_00003.exit.json; the node tests write others, too.
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
    # Records of older code have no kind.
    kind = record["kind"] if "kind" in record else classify(code, message)
    return RankExit(rank, record["host"], record["time"], code, message, kind=kind)


# -- what srun prints ------------------------------------------------------------------------------


def ended_tasks(launcher_log: str) -> dict[int, str]:
    """Return the tasks that srun says ended badly, with its words.

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
    """Return whether srun says that a task ended badly."""
    return _TASK_ENDED.search(launcher_log) is not None


def last_launcher_line(log: str) -> str:
    """Return the last line of srun or torchrun that says more than that a task ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        ruler = not line.strip("=-*")
        if not ruler and not _TASK_ENDED.search(line) and "Terminated StepId" not in line:
            return line[:500]
    if not lines:
        return ""
    return lines[-1][:500]


def read_log(path: Path) -> str:
    """Return the text of a log; empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

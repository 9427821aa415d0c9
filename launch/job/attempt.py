"""One start of a run's ranks, watched to its end: who started, who ended how, and nobody waits for
ever for one that is gone.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from launch.job.rank import CLEAN_EXITS
from launch.job.spec import Restarts, read_record
from llada.training.signals import StopRequest

_POLL_SECONDS = 0.25
_LOOK_SECONDS = 3.0
"""Between looks at shared folders in a run of weeks."""
_REPEAT_SECONDS = 10.0
_OTHERS_SECONDS = 15.0
"""After a failure: for the other ranks' own messages."""
_KILL_SECONDS = 120.0
_TASK_ENDED = re.compile(r"srun: error: \S+: tasks? (?P<tasks>[\d,-]+): (?P<how>.*)")
"""srun's word of a task that did not end well."""
_LOST_PEER = re.compile(
    r"connection (was )?(reset|closed|refused|aborted)|broken pipe|remote process"
    r" exited|ncclRemoteError|NCCL communicator was aborted"
    r"|socket timeout|pair closure|recvValue failed|sendBytes failed|failed to recv|client socket"
    r" has timed out",
    re.IGNORECASE,
)
"""What gloo, NCCL and torch's store say in a rank whose peer is gone."""
_ENDED_BY_OTHERS = (-signal.SIGABRT, -signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1)
"""NCCL aborts a process whose peer is gone; torchrun sends SIGTERM to the other ranks when one has
failed.
"""


class Machine(Protocol):
    """Where ranks run: nodes of a Slurm job, or this machine."""

    hosts: list[str]

    def start(
        self, command: Sequence[str], ranks: int, folder: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start every rank; the process ends when they have."""

    def deliver(self, name: str, starts: list[dict[str, Any]]) -> None:
        """Signal every rank."""

    def kill(self, process: subprocess.Popen[bytes], starts: list[dict[str, Any]]) -> None:
        """End every rank at once."""

    def gone(self, starts: list[dict[str, Any]], launcher_log: str) -> dict[int, str]:
        """Ranks whose parent process ended without being able to write down how: rank -> what is
        known of it.
        """


@dataclass(frozen=True)
class Exit:
    """How a rank ended: exit code, or minus the signal; the last line that says why.

    Attributes:
        rank, host, time: of the end.
        code: exit code, or minus the signal.
        message: last line of the rank that says why.
        parent: what is known of the end of its parent process, which could not write down the
            rank's; None: it did.
    """

    rank: int
    host: str
    time: float
    code: int
    message: str | None
    parent: str | None = None

    @property
    def blames_another(self) -> bool:
        """It ended because another rank was gone, or was made to end."""
        return self.code in _ENDED_BY_OTHERS or bool(
            self.message and _LOST_PEER.search(self.message)
        )

    def __str__(self) -> str:
        if self.parent is not None:
            how = (
                f"gone together with its parent process ({self.parent}); a lack of memory does this"
            )
        elif self.code < 0:
            how = f"killed by {signal.Signals(-self.code).name}"
        else:
            how = (self.message or f"exit code {self.code}").removeprefix("failed: ")
        return f"rank {self.rank} on {self.host}: {how}"


@dataclass(frozen=True)
class StepEnd:
    """How a start of all ranks ended.

    Attributes:
        exits: of the ranks that ended by themselves or by a signal, in the order of their ends.
        ranks: how many there should have been.
        hosts: where they should have been.
        absent: those of ranks that never started.
        killed: the others were ended because they did not end by themselves.
        launcher: exit code of srun or torchrun, and its last line.
    """

    exits: list[Exit]
    ranks: int
    hosts: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    killed: bool = False
    launcher: tuple[int, str] = (0, "")

    @property
    def finished(self) -> bool:
        return len(self.exits) == self.ranks and all(end.code == 0 for end in self.exits)

    @property
    def first_failure(self) -> Exit | None:
        """The first rank that did not end in order; one that only noticed that another was gone
        comes after that one.
        """
        failed = [end for end in self.exits if end.code not in CLEAN_EXITS]
        return min(failed, key=lambda end: (end.blames_another, end.time), default=None)


class StopState:
    """Whether the run is asked to end: by a signal, or by a file that `llada stop` made.

    Args:
        stop: signals of this process.
        wanted: the file.
    """

    def __init__(self, stop: StopRequest, wanted: Path) -> None:
        self._stop, self._path = stop, wanted
        self._looked = float("-inf")
        self._there = False

    @property
    def signal(self) -> str | None:
        """The last signal of this process."""
        return self._stop.signal

    @property
    def wanted(self) -> bool:
        """The user wants an end, not another start; some seconds old."""
        if not self._there and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._there = self._path.exists()
        return self._there

    @property
    def wanted_now(self) -> bool:
        """The same at this moment, for a decision that depends on it."""
        with suppress(OSError):
            # An NFS client remembers for a while that a name was absent. A new name beside it makes
            # it ask its server again.
            probe = self._path.with_name(f"{self._path.name}.{os.getpid()}.probe")
            probe.touch()
            probe.unlink()
        self._there = self._there or self._path.exists()
        return self._there

    def __bool__(self) -> bool:
        return bool(self._stop) or self.wanted


def run_ranks(
    machine: Machine,
    command: Sequence[str],
    ranks: int,
    folder: Path,
    environment: dict[str, str],
    asked: StopState,
    limits: Restarts,
    end_by: float = float("inf"),
    on_sigterm: Callable[[], None] | None = None,
) -> StepEnd:
    """Start `command` on every rank and watch it.

    Args:
        machine: where.
        command: of every rank.
        ranks: how many.
        folder: for the ranks' logs and records; exists.
        environment: further variables of the ranks.
        asked: true when they are to stop.
        limits: of time.
        end_by: seconds since 1970 at which the ranks are ended, whatever they do: before Slurm ends
            this process with them.
        on_sigterm: called once when this process gets SIGTERM, before anything is waited for.
    """
    process = machine.start(command, ranks, folder, environment)
    console = _Console(folder / "rank_00000.log")
    records = _Records(folder, ranks)
    started = time.monotonic()
    delivered, deadline, killed, absent = float("-inf"), float("inf"), False, list[str]()
    lost = _Lost(machine, folder / "launcher.log")
    while process.poll() is None:
        now = time.monotonic()
        if records.refresh() and not killed:
            lost.look(records)
        if lost.exits:
            deadline = min(deadline, now + min(_OTHERS_SECONDS, limits.grace))
        if not records.all_started and now - started > limits.start_timeout and not absent:
            absent = _absent(machine.hosts, ranks, records.starts)
            deadline = now
        if not records.all_started and _TASK_ENDED.search(_read(folder / "launcher.log")):
            # it could not even write down that it started
            deadline = min(deadline, now + min(_OTHERS_SECONDS, limits.grace))
        if asked.signal == "SIGTERM" and on_sigterm is not None:
            on_sigterm()
            on_sigterm = None
        if asked and records.starts and now - delivered > _REPEAT_SECONDS:
            machine.deliver("USR1", records.starts)
            delivered = now
        if records.exits:
            failed = any(end.code not in CLEAN_EXITS for end in records.exits)
            deadline = min(
                deadline, now + (min(_OTHERS_SECONDS, limits.grace) if failed else limits.grace)
            )
        if time.time() > end_by:
            deadline = now
        if now >= deadline and not killed:
            killed = True
            lost.look(records, at_last=True)
            machine.kill(process, records.starts)
        time.sleep(_POLL_SECONDS)
    console.close()
    records.refresh(everything=True)
    if not killed:
        lost.look(records, at_last=True)
        if process.returncode < 0 and len(records.exits) < len(records.starts):
            # the ranks outlive torchrun, and would hold the run folder against the next attempt
            machine.kill(process, records.starts)
    if not absent and not records.all_started:
        absent = _absent(machine.hosts, ranks, records.starts)
    launcher = process.returncode, _last_line(folder / "launcher.log")
    exits = sorted([*records.exits, *lost.without_record(records)], key=lambda end: end.time)
    return StepEnd(exits, ranks, machine.hosts, absent, killed, launcher)


class _Lost:
    """Ranks whose parent was killed with them: nobody is left to write down their end.

    Args:
        machine: that knows which parents are gone.
        log: of srun or torchrun.
    """

    def __init__(self, machine: Machine, log: Path) -> None:
        self._machine, self._log = machine, log
        self._suspected: dict[int, str] = {}
        self.exits: list[Exit] = []

    def look(self, records: _Records, at_last: bool = False) -> None:
        """Note the parents that are gone. One that ended in order wrote its record just before: it
        counts at the second look only.

        With `at_last`, this is the second one: what has no record yet gets none.
        """
        gone = self._machine.gone(records.starts, _read(self._log))
        if at_last:
            self._suspected = gone
        named = {end.rank for end in self.exits}
        hosts = {entry["rank"]: entry["host"] for entry in records.starts}
        ended = {end.rank for end in records.exits}
        for rank, how in self._suspected.items():
            if rank in hosts and rank not in ended and rank not in named:
                self.exits.append(Exit(rank, hosts[rank], time.time(), -signal.SIGKILL, None, how))
        self._suspected = gone

    def without_record(self, records: _Records) -> list[Exit]:
        """Their ends; a record that came late counts more."""
        ended = {end.rank for end in records.exits}
        return [end for end in self.exits if end.rank not in ended]


def ended_tasks(launcher_log: str) -> dict[int, str]:
    """Tasks that srun says ended badly, with its own words; of n2's "tasks 2,4-5: Killed" three."""
    found: dict[int, str] = {}
    for line in _TASK_ENDED.finditer(launcher_log):
        for part in line["tasks"].split(","):
            first, _, last = part.partition("-")
            found |= dict.fromkeys(
                range(int(first), int(last or first) + 1), f"srun: {line['how'].strip()}"
            )
    return found


class _Records:
    """What the ranks wrote down; each file is read once, and the folder looked at no more often
    than its file server likes.
    """

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks
        self._read: dict[str, dict[str, Any]] = {}
        self._began = time.monotonic()
        self._next = 0.0

    @property
    def all_started(self) -> bool:
        return len(self.starts) == self._ranks

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Of the ranks that started, in their order."""
        return [self._read[name] for name in sorted(self._read) if name.endswith(".start.json")]

    @property
    def exits(self) -> list[Exit]:
        """Of the ranks that ended, the first one first."""
        found = [entry for name, entry in self._read.items() if name.endswith(".exit.json")]
        ends = [
            Exit(entry["rank"], entry["host"], entry["time"], entry["code"], entry["message"])
            for entry in found
        ]
        return sorted(ends, key=lambda end: end.time)

    def refresh(self, everything: bool = False) -> bool:
        """Read what is new, if it is time to look, or at once; whether it was."""
        now = time.monotonic()
        if now < self._next and not everything:
            return False
        self._next = now + (0.5 if now - self._began < 120 else _LOOK_SECONDS)
        for path in self._folder.glob("rank_*.json"):
            if path.name not in self._read and (record := read_record(path)) is not None:
                self._read[path.name] = {
                    **record,
                    "rank": int(path.name.split(".")[0].removeprefix("rank_")),
                }
        return True


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Wait for a launcher whose ranks were killed, and end it if it does not."""
    try:
        process.wait(_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _absent(hosts: list[str], ranks: int, starts: list[dict[str, Any]]) -> list[str]:
    """Hosts on which not every rank started; ranks fill the hosts in order."""
    per_host = max(1, ranks // len(hosts))
    there = {entry["rank"] for entry in starts}
    return sorted(
        {hosts[min(rank // per_host, len(hosts) - 1)] for rank in range(ranks) if rank not in there}
    )


def _last_line(path: Path) -> str:
    """The last line of a launcher's output that says something of its own: that a task ended is
    known.
    """
    lines = [line.strip() for line in _read(path).splitlines() if line.strip()]
    telling = [
        line
        for line in lines
        if not _TASK_ENDED.search(line) and "Terminated StepId" not in line and line.strip("=-*")
    ]
    return (telling or lines or [""])[-1][:500]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class _Console:
    """Copies what a growing file gets to this process's output."""

    def __init__(self, path: Path) -> None:
        self._path, self._ended = path, threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        position = 0
        while True:
            ending = self._ended.wait(_POLL_SECONDS)
            if self._path.exists():
                with open(self._path, "rb") as file:
                    file.seek(position)
                    while chunk := file.read(1 << 16):
                        sys.stdout.buffer.write(chunk)
                        position += len(chunk)
                sys.stdout.flush()
            if ending:
                return

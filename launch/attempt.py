"""One start of a run's ranks, watched to its end: who started, who ended how, and nobody waits for ever for one that is gone."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from launch.job import Restarts, read_record
from launch.rank import IN_ORDER
from llada.training.signals import StopRequest

_POLL_SECONDS = 0.25
_REPEAT_SECONDS = 10.0
_OTHERS_SECONDS = 15.0
"""After a failure: for the other ranks' own messages."""
_KILL_SECONDS = 120.0
_TASK_ENDED = re.compile(r"srun: error: \S+: tasks? [\d,-]+: ")
"""srun's word of a task that did not end well."""


class Machine(Protocol):
    """Where ranks run: nodes of a Slurm job, or this machine."""

    hosts: list[str]

    def start(self, command: Sequence[str], ranks: int, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start every rank; the process ends when they have."""

    def deliver(self, name: str, starts: list[dict[str, Any]]) -> None:
        """Signal every rank."""

    def kill(self, process: subprocess.Popen[bytes], starts: list[dict[str, Any]]) -> None:
        """End every rank at once."""


@dataclass(frozen=True)
class Exit:
    """How a rank ended: exit code, or minus the signal; the last line that says why."""

    rank: int
    host: str
    time: float
    code: int
    message: str | None

    def __str__(self) -> str:
        if self.code < 0:
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
        """The first rank that did not end in order."""
        return next((end for end in self.exits if end.code not in IN_ORDER), None)


def run_ranks(
    machine: Machine, command: Sequence[str], ranks: int, folder: Path, environment: dict[str, str], stop: StopRequest, limits: Restarts
) -> StepEnd:
    """Start `command` on every rank and watch it.

    Args:
        machine: where.
        command: of every rank.
        ranks: how many.
        folder: for the ranks' logs and records; exists.
        environment: further variables of the ranks.
        stop: asked to stop when true; handed on to the ranks.
        limits: of time.
    """
    process = machine.start(command, ranks, folder, environment)
    console = _Console(folder / "rank_00000.log")
    started = time.monotonic()
    delivered, deadline, killed = float("-inf"), float("inf"), False
    absent: list[str] = []
    while process.poll() is None:
        now = time.monotonic()
        starts = _records(folder, "start")
        exits = _exits(folder)
        if len(starts) < ranks and now - started > limits.start_timeout:
            absent = _absent(machine.hosts, ranks, starts)
            deadline = now
        if len(starts) < ranks and _TASK_ENDED.search(_read(folder / "launcher.log")):
            deadline = min(deadline, now + min(_OTHERS_SECONDS, limits.grace))  # it could not even write down that it started
        if stop and starts and now - delivered > _REPEAT_SECONDS:
            machine.deliver("USR1", starts)
            delivered = now
        if exits:
            patience = min(_OTHERS_SECONDS, limits.grace) if any(end.code not in IN_ORDER for end in exits) else limits.grace
            deadline = min(deadline, now + patience)
        if now >= deadline and not killed:
            killed = True
            machine.kill(process, starts)
        time.sleep(_POLL_SECONDS)
    console.close()
    starts, exits = _records(folder, "start"), _exits(folder)
    if not absent and len(starts) < ranks:
        absent = _absent(machine.hosts, ranks, starts)
    return StepEnd(exits, ranks, machine.hosts, absent, killed, (process.returncode, _last_line(folder / "launcher.log")))


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Wait for a launcher whose ranks were killed, and end it if it does not."""
    try:
        process.wait(_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _records(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob(f"rank_*.{kind}.json")):
        record = read_record(path)
        if record is not None:
            found.append({**record, "rank": int(path.name.split(".")[0].removeprefix("rank_"))})
    return found


def _exits(folder: Path) -> list[Exit]:
    found = [Exit(entry["rank"], entry["host"], entry["time"], entry["code"], entry["message"]) for entry in _records(folder, "exit")]
    return sorted(found, key=lambda end: end.time)


def _absent(hosts: list[str], ranks: int, starts: list[dict[str, Any]]) -> list[str]:
    """Hosts on which not every rank started; ranks fill the hosts in order."""
    per_host = max(1, ranks // len(hosts))
    there = {entry["rank"] for entry in starts}
    return sorted({hosts[min(rank // per_host, len(hosts) - 1)] for rank in range(ranks) if rank not in there})


def _last_line(path: Path) -> str:
    """The last line of a launcher's output that says something of its own: that a task ended is known."""
    lines = [line.strip() for line in _read(path).splitlines() if line.strip()]
    telling = [line for line in lines if not _TASK_ENDED.search(line) and "Terminated StepId" not in line]
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

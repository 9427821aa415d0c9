"""One attempt: starts all ranks and watches them until the last one has ended.

It records which ranks start and how each of them ends. When one is gone, it ends the others, which
would wait for it forever. Standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from launch.job.failure import CLEAN_EXITS
from launch.job.machines import LAUNCHER_LOG, Machine, RankCommand
from launch.job.records import (
    LOOK_SECONDS,
    AttemptEnd,
    RankExit,
    RankRecords,
    RankStart,
    last_launcher_line,
    read_log,
    reports_ended_task,
)
from launch.job.spec import Restarts
from llada.training.signals import StopRequest

_POLL_SECONDS = 0.25
_REPEAT_SIGNAL_SECONDS = 10.0
_LAST_WORDS_SECONDS = 15.0
"""Seconds that the other ranks have after a failure, to write their own messages."""
_NEVER = float("inf")


class StopState:
    """Whether the run is asked to stop: by a signal, or by the file that `llada stop` makes.

    Args:
        stop: stop signals of this process.
        path: path of the file.
    """

    def __init__(self, stop: StopRequest, path: Path) -> None:
        self._stop = stop
        self._path = path
        self._last_look = float("-inf")
        self._file_seen = False

    @property
    def signal(self) -> str | None:
        """The last stop signal of this process."""
        return self._stop.signal

    def requested(self) -> bool:
        """Return whether the run is asked to stop, even if only to restart."""
        return bool(self._stop) or self.requested_by_user()

    def requested_by_user(self, fresh: bool = False) -> bool:
        """Look for the file of `llada stop`: the user wants the run to end, not to restart.

        Args:
            fresh: look now; otherwise the last look may be `LOOK_SECONDS` old.
        """
        if self._file_seen:
            return True
        is_due = time.monotonic() - self._last_look > LOOK_SECONDS
        if not fresh and not is_due:
            return False
        if fresh:
            self._forget_absence()
        self._last_look = time.monotonic()
        self._file_seen = self._path.exists()
        return self._file_seen

    def _forget_absence(self) -> None:
        """Make an NFS client ask its server whether the file exists.

        The client remembers for a while that a name was absent, until a name is made beside it.
        """
        with suppress(OSError):
            probe = self._path.with_name(f"{self._path.name}.{os.getpid()}.probe")
            probe.touch()
            probe.unlink()


def run_ranks(
    machine: Machine,
    command: RankCommand,
    stop: StopState,
    limits: Restarts,
    end_by: float = _NEVER,
    on_sigterm: Callable[[], None] | None = None,
) -> AttemptEnd:
    """Start a command on every rank and watch the ranks until all have ended.

    Args:
        machine: where the ranks run.
        command: command of every rank.
        stop: whether the ranks are to stop.
        limits: time limits.
        end_by: time at which the ranks are killed, seconds since 1970: before Slurm kills this
            process with them.
        on_sigterm: called once when this process gets SIGTERM, before the ranks are signalled.
    """
    watch = _Watch(machine, command, stop, limits, end_by, on_sigterm)
    return watch.run()


class _Watch:
    """Watches the ranks of one attempt. The arguments are those of `run_ranks`."""

    def __init__(
        self,
        machine: Machine,
        command: RankCommand,
        stop: StopState,
        limits: Restarts,
        end_by: float,
        on_sigterm: Callable[[], None] | None,
    ) -> None:
        self._machine = machine
        self._command = command
        self._stop = stop
        self._limits = limits
        self._end_by = end_by
        self._on_sigterm = on_sigterm
        self._launcher_log = command.folder / LAUNCHER_LOG
        self._records = RankRecords(command.folder, command.ranks)
        self._orphans = _Orphans(machine, self._launcher_log)
        self._absent: list[str] = []
        self._killed = False
        # Times of the monotonic clock.
        self._started = time.monotonic()
        self._signalled = float("-inf")
        self._deadline = _NEVER

    def run(self) -> AttemptEnd:
        process = self._machine.start(self._command)
        self._started = time.monotonic()
        console = _Console(self._command.folder / "rank_00000.log")
        while process.poll() is None:
            self._look()
            if time.monotonic() >= self._deadline and not self._killed:
                self._kill(process)
            time.sleep(_POLL_SECONDS)
        console.close()
        return self._end(process)

    def _look(self) -> None:
        """Look for changes, and set an earlier deadline if something failed."""
        now = time.monotonic()
        if self._records.refresh() and not self._killed:
            self._orphans.look(self._records)
        if self._orphans.exits:
            self._set_deadline(now + self._last_words_seconds)
        if not self._records.all_started:
            self._look_for_absent(now)
        self._forward_stop(now)
        if self._records.exits:
            codes = [rank_exit.code for rank_exit in self._records.exits]
            failed = any(code not in CLEAN_EXITS for code in codes)
            # After a clean exit, the other ranks are finishing the same step.
            wait = self._limits.grace
            if failed:
                wait = self._last_words_seconds
            self._set_deadline(now + wait)
        if time.time() > self._end_by:
            self._set_deadline(now)

    @property
    def _last_words_seconds(self) -> float:
        return min(_LAST_WORDS_SECONDS, self._limits.grace)

    def _set_deadline(self, deadline: float) -> None:
        # Never later: a failure is seen again at every look.
        self._deadline = min(self._deadline, deadline)

    def _look_for_absent(self, now: float) -> None:
        start_is_overdue = now - self._started > self._limits.start_timeout
        if start_is_overdue and not self._absent:
            self._absent = self._absent_hosts()
            self._set_deadline(now)
        # A task may have failed before it could write the record of its start.
        if reports_ended_task(read_log(self._launcher_log)):
            self._set_deadline(now + self._last_words_seconds)

    def _forward_stop(self, now: float) -> None:
        if self._stop.signal == "SIGTERM" and self._on_sigterm is not None:
            self._on_sigterm()
            self._on_sigterm = None
        is_due = now - self._signalled > _REPEAT_SIGNAL_SECONDS
        if is_due and self._records.starts and self._stop.requested():
            self._machine.signal_ranks("USR1", self._records.starts)
            self._signalled = now

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        self._killed = True
        # Before the kill, after which every parent is gone.
        self._orphans.look(self._records, last=True)
        self._machine.kill(process, self._records.starts)

    def _end(self, process: subprocess.Popen[bytes]) -> AttemptEnd:
        records = self._records
        records.refresh(now=True)
        if not self._killed:
            self._orphans.look(records, last=True)
            # Ranks outlive a torchrun that was killed. They would keep the lock of the run folder,
            # which the next attempt needs.
            launcher_was_killed = process.returncode < 0
            ranks_are_left = len(records.exits) < len(records.starts)
            if launcher_was_killed and ranks_are_left:
                self._machine.kill(process, records.starts)
        if not self._absent and not records.all_started:
            self._absent = self._absent_hosts()
        exits = [*records.exits, *self._orphans.without_record(records)]
        return AttemptEnd(
            exits=sorted(exits, key=lambda rank_exit: rank_exit.time),
            ranks=self._command.ranks,
            hosts=self._machine.hosts,
            absent=self._absent,
            killed=self._killed,
            launcher_code=process.returncode,
            launcher_line=last_launcher_line(read_log(self._launcher_log)),
        )

    def _absent_hosts(self) -> list[str]:
        return absent_hosts(self._machine.hosts, self._command.ranks, self._records.starts)


def absent_hosts(hosts: list[str], ranks: int, starts: list[RankStart]) -> list[str]:
    """Return the hosts on which not every rank started.

    Ranks fill the hosts one after the other: of 4 ranks on n0 and n1, rank 2 is the first on n1.
    """
    per_host = max(1, ranks // len(hosts))
    started = {start.rank for start in starts}
    absent = set()
    for rank in range(ranks):
        if rank not in started:
            absent.add(hosts[min(rank // per_host, len(hosts) - 1)])
    return sorted(absent)


class _Orphans:
    """Ranks whose parent was killed too, so that no record says how they ended.

    Args:
        machine: where the ranks run; it knows which parents are gone.
        launcher_log: log of srun or torchrun.
    """

    def __init__(self, machine: Machine, launcher_log: Path) -> None:
        self._machine = machine
        self._launcher_log = launcher_log
        self._suspected: dict[int, str] = {}
        self.exits: list[RankExit] = []

    def look(self, records: RankRecords, last: bool = False) -> None:
        """Look for parents that are gone, and add the ranks that have no record.

        A parent that exited cleanly has just written a record, which may not be visible yet. So a
        rank is added only if its record is still missing at the next look, or at once with `last`.
        """
        gone = self._machine.dead_parents(records.starts, read_log(self._launcher_log))
        if last:
            self._suspected = gone
        hosts = {start.rank: start.host for start in records.starts}
        counted = {rank_exit.rank for rank_exit in [*self.exits, *records.exits]}
        for rank, parent_end in self._suspected.items():
            if rank in hosts and rank not in counted:
                self.exits.append(
                    RankExit(
                        rank,
                        hosts[rank],
                        time=time.time(),
                        code=-signal.SIGKILL,
                        message=None,
                        parent_end=parent_end,
                        kind="killed",
                    )
                )
        self._suspected = gone

    def without_record(self, records: RankRecords) -> list[RankExit]:
        """Return the exits of these ranks, except where a record became visible later."""
        recorded = {rank_exit.rank for rank_exit in records.exits}
        return [rank_exit for rank_exit in self.exits if rank_exit.rank not in recorded]


class _Console:
    """A thread that copies what is appended to a file to this process's standard output."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy what is left, and end the thread."""
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        ended = False
        while not ended:
            # Copy once more after the end: the last lines were written just before it.
            ended = self._ended.wait(_POLL_SECONDS)
            if self._path.exists():
                self._copy()

    def _copy(self) -> None:
        with open(self._path, "rb") as file:
            file.seek(self._position)
            while chunk := file.read(1 << 16):
                sys.stdout.buffer.write(chunk)
                self._position += len(chunk)
        sys.stdout.flush()

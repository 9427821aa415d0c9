"""`llada logs`: the log of a rank. It can be followed through restarts until the run ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.status import live_jobs, local_supervisor
from llada import events
from llada.errors import UserError
from llada.training import lock

_POLL_SECONDS = 1.0
_QUERY_SECONDS = 10.0
"""Seconds between two calls of squeue while a log is followed, which load Slurm's controller."""


@dataclass(frozen=True)
class LogChoice:
    """Which log of a run to print.

    Attributes:
        folder: folder of the run.
        rank: number of the rank.
        attempt: number of the attempt; None: the latest attempt that has a log of this rank.
        task: number of the task of a job array; None: the run is not an array.
    """

    folder: Path
    rank: int = 0
    attempt: int | None = None
    task: int | None = None

    @property
    def _attempts_folder(self) -> Path:
        logs = self.folder / "logs"
        if self.task is None:
            return logs
        return logs / f"task-{self.task:05d}"

    def find(self) -> Path | None:
        """Return the path of the log; None: there is none yet."""
        pattern = "attempt-*"
        if self.attempt is not None:
            pattern = f"attempt-{self.attempt:04d}"
        for attempt_folder in sorted(self._attempts_folder.glob(pattern), reverse=True):
            path = attempt_folder / f"rank_{self.rank:05d}.log"
            if path.is_file():
                return path
        is_default_choice = self.attempt is None and self.rank == 0
        if not is_default_choice:
            return None
        # Before the first rank starts, there is only the log of the batch script.
        job_logs = (self.folder / "logs").glob("job-*.log")
        return max(job_logs, key=lambda path: path.stat().st_mtime, default=None)

    def explain_missing(self) -> str:
        """Say why there is no such log, and which logs there are."""
        names = sorted(path.name for path in self._attempts_folder.glob("attempt-*"))
        if not names:
            return f"logs: '{self._attempts_folder}' has none yet"
        if self.attempt is not None and f"attempt-{self.attempt:04d}" not in names:
            numbers = [name.removeprefix("attempt-").lstrip("0") for name in names]
            return f"--attempt: {self.attempt} is not one of {', '.join(numbers)}"
        latest = self._attempts_folder / names[-1]
        ranks = len(list(latest.glob("rank_*.log")))
        if not ranks:
            return f"logs: '{latest}' has none yet"
        return f"--rank: {self.rank} has no log; there are 0 to {ranks - 1}"


def read_log(choice: LogChoice) -> bytes:
    """Return the present content of a log.

    Raises:
        UserError: there is no such log.
    """
    path = choice.find()
    if path is None:
        raise UserError(choice.explain_missing())
    return path.read_bytes()


def follow_log(choice: LogChoice) -> Iterator[bytes]:
    """Yield the content of a log and what is appended to it, until the run ends.

    After a restart, the log of the new attempt follows.

    Raises:
        UserError: the run ended without such a log.
    """
    shown: Path | None = None
    position = 0
    last_query = float("-inf")
    ended = False
    while True:
        path = choice.find()
        if path is None and ended:
            raise UserError(choice.explain_missing())
        if path is not None:
            if shown is not None and path != shown:
                yield _read_from(shown, position)
                yield f"--- {path}\n".encode()
                position = 0
            shown = path
            chunk = _read_from(path, position)
            position += len(chunk)
            yield chunk
        # Only now, so that lines written just before the end are shown too.
        if ended:
            return
        if time.monotonic() - last_query > _QUERY_SECONDS:
            ended = not _is_alive(choice.folder)
            last_query = time.monotonic()
        else:
            time.sleep(_POLL_SECONDS)


def _is_alive(folder: Path) -> bool:
    if lock.describe_holder(folder) or local_supervisor(events.read(folder)):
        return True
    return bool(live_jobs(folder))


def _read_from(path: Path, position: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(position)
        return file.read()


def print_bytes(chunks: Iterable[bytes]) -> None:
    """Write the bytes of a log to standard output unchanged, whatever their encoding."""
    for chunk in chunks:
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()

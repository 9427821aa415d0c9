"""Notices a run that hangs: a rank that stopped answering, or a collective that never ends.

Every rank writes a small heartbeat file from a thread of its own, so a process that is stopped,
swapped out or gone falls silent while one that merely waits for it goes on. When no step ends
within the time allowed, the lowest rank that is still alive names the silent ones, and every live
rank exits for a restart.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from llada import failures

RESTART = 75
"""Exit code: run the same command again."""
_BEATS_PER_TIMEOUT = 10
_DUMP_SECONDS = 30.0


class Beat(NamedTuple):
    """What a rank last said: its host, the steps it has finished, and when (seconds since 1970)."""

    host: str
    step: int
    time: float


class Watchdog:
    """A thread that watches this rank's progress.

    Args:
        folder: where the ranks' heartbeats lie; shared by all hosts, as checkpoints are.
        rank, size: of this process and the world.
        timeout: seconds without a finished step after which the run ends; 0: never.
        leave: called with the message ("" on ranks that do not report) instead of ending the
            process; for tests.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        timeout: float,
        leave: Callable[[str], None] | None = None,
    ) -> None:
        self._folder, self._rank, self._size, self._timeout = folder, rank, size, timeout
        self._leave = leave or _leave
        self._host = socket.gethostname()
        self._step = 0
        self._advanced = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if timeout > 0:
            self._beat()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def advance(self, step: int) -> None:
        """Say that so many steps are done, or that something else long has just ended."""
        self._step, self._advanced = step, time.monotonic()

    def close(self) -> None:
        """End the thread and remove this rank's heartbeat."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._path(self._rank).unlink(missing_ok=True)
            if self._rank == 0:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _watch(self) -> None:
        while not self._stop.wait(self._timeout / _BEATS_PER_TIMEOUT):
            self._beat()
            if time.monotonic() - self._advanced > self._timeout:
                self._report()
                return

    def _beat(self) -> None:
        path = self._path(self._rank)
        try:
            path.parent.mkdir(exist_ok=True)  # not the run folder: one that was deleted stays so
            path.with_suffix(".tmp").write_text(
                json.dumps(Beat(self._host, self._step, time.time())._asdict())
            )
            os.replace(path.with_suffix(".tmp"), path)
        except OSError:
            return  # a full disk is not a hang; the next beat tries again

    def _report(self) -> None:
        beats = {rank: self._read(rank) for rank in range(self._size)}
        limit = time.time() - 3 * self._timeout / _BEATS_PER_TIMEOUT
        alive = [rank for rank, beat in beats.items() if beat is not None and beat.time > limit]
        silent = [rank for rank in beats if rank not in alive]
        dump = threading.Thread(target=_dump_collectives, args=(self._rank,), daemon=True)
        dump.start()
        dump.join(_DUMP_SECONDS)  # not longer: what hangs may hang this too
        if self._rank != min(alive, default=self._rank):
            self._leave("")
            return
        if silent:
            who = "; ".join(_describe(rank, beats[rank]) for rank in silent[:8]) + (
                "; ..." if len(silent) > 8 else ""
            )
        else:
            slowest = min(beats, key=lambda rank: beats[rank].step)  # type: ignore[union-attr]  # all are there
            who = f"every rank answers, none finishes a step; {_describe(slowest, beats[slowest])}"
        self._leave(f"hang: no step finished for {self._timeout:g} s (run.hang_timeout): {who}")

    def _read(self, rank: int) -> Beat | None:
        try:
            content: dict[str, Any] = json.loads(self._path(rank).read_text())
            return Beat(**content)
        except (OSError, ValueError, TypeError):
            return None

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"


def record_collectives(folder: Path) -> None:
    """Keep the last NCCL operations of this process in memory; torch or the watchdog write them to
    `folder` when one does not end.

    Call before the first process group; `folder` may be made later, where it is missing nothing is
    written. Read them with `torchfrtrace --prefix rank_ FOLDER`. Variables that are set already
    stay.
    """
    if not torch.cuda.is_available():
        return
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "rank_"))


def _dump_collectives(rank: int) -> None:
    """Write this rank's last NCCL operations to the file that torch itself would use."""
    prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
    if prefix is not None and dist.is_nccl_available():
        c10d: Any = torch._C._distributed_c10d
        # the process is about to end; the report is what matters
        with contextlib.suppress(OSError, RuntimeError):
            Path(f"{prefix}{rank}").write_bytes(c10d._dump_nccl_trace())


def _describe(rank: int, beat: Beat | None) -> str:
    if beat is None:
        return f"rank {rank} never answered"
    return (
        f"rank {rank} on host {beat.host} answered {time.time() - beat.time:.0f} s ago, last step"
        f" {beat.step}"
    )


def _leave(message: str) -> None:
    """End the process at once: its main thread waits for a rank that does not come back."""
    if message:
        failures.report("hang")
        print(
            f"failed: {message}; run the same command again to continue from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
    os._exit(RESTART)

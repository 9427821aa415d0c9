"""Ends a run that hangs: a rank that stopped answering, or a collective that never ends.

Every rank writes a small heartbeat file from a thread of its own, so a process that is stopped,
swapped out or gone falls silent, while one that merely waits for it goes on. When no step ends
within the allowed time, the lowest rank that is alive names the silent ones, and every live rank
exits for a restart.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from llada import exits, failures
from llada.engine.base import StepResult
from llada.training.hooks import Hook

_BEATS_PER_TIMEOUT = 10
_DUMP_SECONDS = 30.0
_MOST_NAMED = 8
"""Silent ranks that a report names at most."""


class Beat(NamedTuple):
    """What a rank last reported.

    Attributes:
        host: host that the rank runs on.
        step: steps it has finished.
        time: when it reported, seconds since 1970.
    """

    host: str
    step: int
    time: float


class Watchdog(Hook):
    """A thread that watches this rank's progress.

    Args:
        folder: folder of the ranks' heartbeat files; shared by all hosts, as checkpoints are.
        rank, size: this process's rank and the number of ranks.
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
        self._folder = folder
        self._rank = rank
        self._size = size
        self._timeout = timeout
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
        """Report that `step` steps are done, or that something else that takes long has ended."""
        self._step = step
        self._advanced = time.monotonic()

    def on_step(self, done: int, result: StepResult) -> None:
        self.advance(done)

    def on_validation(self, done: int) -> None:
        self.advance(done)

    def on_save(self, done: int) -> None:
        self.advance(done)

    def on_end(self) -> None:
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
        temporary = path.with_suffix(".tmp")
        try:
            # Not the run folder itself: one that was deleted must stay deleted.
            path.parent.mkdir(exist_ok=True)
            # Not files.write_json, which flushes to disk: a beat counts for seconds, and no crash
            # makes an old one new.
            temporary.write_text(json.dumps(Beat(self._host, self._step, time.time())._asdict()))
            os.replace(temporary, path)
        except OSError:
            return  # a full disk is not a hang; the next beat tries again

    def _report(self) -> None:
        """End this process; on the lowest rank that is alive, name the ranks that hang."""
        beats = {rank: self._read(rank) for rank in range(self._size)}
        # Three beats may be missed: file servers and busy nodes are late now and then.
        oldest = time.time() - 3 * self._timeout / _BEATS_PER_TIMEOUT
        alive = [rank for rank, beat in beats.items() if beat is not None and beat.time > oldest]
        silent = [rank for rank in beats if rank not in alive]
        # In a thread with a time limit: what hangs the run may hang this too.
        dump = threading.Thread(target=_dump_collectives, args=(self._rank,), daemon=True)
        dump.start()
        dump.join(_DUMP_SECONDS)
        if self._rank != min(alive, default=self._rank):
            self._leave("")
            return
        if silent:
            culprits = _describe_silent(silent, beats)
        else:
            culprits = _describe_slowest(beats)
        self._leave(
            f"hang: no step finished for {self._timeout:g} s (run.hang_timeout): {culprits}"
        )

    def _read(self, rank: int) -> Beat | None:
        try:
            return Beat(**json.loads(self._path(rank).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"


def record_collectives(folder: Path) -> None:
    """Keep the last NCCL operations of this process in memory, to be written when one hangs.

    Torch or the watchdog then write them to `folder`; `torchfrtrace --prefix rank_ FOLDER` reads
    them. Where the folder does not exist, nothing is written. Call this before the first process
    group is made. Environment variables that are set already stay.
    """
    if not torch.cuda.is_available():
        return
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "rank_"))


def _dump_collectives(rank: int) -> None:
    """Write this rank's last NCCL operations to the file that torch itself would use."""
    prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
    if prefix is None or not dist.is_nccl_available():
        return
    # The process is about to end, and the report matters more than the dump.
    with contextlib.suppress(OSError, RuntimeError):
        c10d: Any = torch._C._distributed_c10d  # without NCCL its stubs lack the function
        Path(f"{prefix}{rank}").write_bytes(c10d._dump_nccl_trace())


def _describe_silent(silent: list[int], beats: Mapping[int, Beat | None]) -> str:
    described = [_describe(rank, beats[rank]) for rank in silent[:_MOST_NAMED]]
    if len(silent) > _MOST_NAMED:
        described.append("...")
    return "; ".join(described)


def _describe_slowest(beats: Mapping[int, Beat | None]) -> str:
    steps = {rank: beat.step for rank, beat in beats.items() if beat is not None}
    slowest = min(steps, key=lambda rank: steps[rank])
    return f"every rank answers, none finishes a step; {_describe(slowest, beats[slowest])}"


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
    os._exit(exits.RESTART)

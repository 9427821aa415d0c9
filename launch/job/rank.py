"""What srun or torchrun starts for every rank: the parent process of the rank's command.

It prepares the environment, runs the command as a child and records how that ended. A parent of its
own can record every end, SIGKILL and a crash of the interpreter included, and can hold back signals
until the child handles them. Standard library only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple, get_args

from launch.job import affinity
from launch.job.failure import CLEAN_EXITS, classify
from llada.failures import REPORT_VARIABLE, FailureKind
from llada.files import write_atomically

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_REPEAT_SECONDS = 2.0
_LOG_TAIL_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
"""prctl option: the signal that a process gets when its parent ends."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank; returns 0 for an end in order, else 1.

    The records are rank_NNNNN.start.json and rank_NNNNN.exit.json.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--bind", action="store_true")
    parser.add_argument("--default-signals", action="store_true")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)

    # Before anything that takes time: a signal must find its handler.
    forwarder = _SignalForwarder()
    rank = RankEnvironment.of_this_process()
    record_path = options.folder / f"rank_{rank.rank:05d}"
    report = record_path.with_suffix(".failure")
    environment = {**os.environ, **rank.variables(), REPORT_VARIABLE: str(report)}
    if options.bind:
        # Counted before binding narrows the cores of this process.
        environment["LLADA_THREADS"] = str(_cores_per_rank(rank.local_size))
        affinity.bind(rank.local_rank, rank.local_size)
    _write_record(
        record_path.with_suffix(".start.json"),
        {"pid": os.getpid(), "step": os.environ.get("SLURM_STEP_ID")},
    )
    log_path = record_path.with_suffix(".log")
    with open(log_path, "ab", buffering=0) as log:
        child = subprocess.Popen(
            options.command,
            cwd=options.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: _prepare_child(ignore_signals=not options.default_signals),
        )
    code = forwarder.wait(child)
    message = last_message(log_path)
    kind = classify(code, message, _take_report(report))
    _write_record(
        record_path.with_suffix(".exit.json"), {"code": code, "message": message, "kind": kind}
    )
    # torchrun takes any other code for a failure and kills the other ranks.
    return int(code not in CLEAN_EXITS)


def _cores_per_rank(local_size: int) -> int:
    """Cores that a rank has to itself: those Slurm gave it, or its share of the machine's."""
    cores = len(os.sched_getaffinity(0))
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if granted.isdigit() and int(granted) > 0:
        return min(int(granted), cores)
    return max(1, cores // local_size)


class RankEnvironment(NamedTuple):
    """Which rank a process is, as the launcher's own processes see it.

    Training reads its rank in `llada.engine.layout.world_from_environment`, which also serves ranks
    that were started without the launcher and explains what is wrong with their variables.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def of_this_process(cls) -> RankEnvironment:
        """Read Slurm's variables in a job step, torchrun's otherwise."""
        env = os.environ
        # Slurm's come first: torchrun's may be left over in the environment that the job was
        # submitted from.
        if "SLURM_STEP_ID" in env and "LLADA_LOCAL" not in env:
            size = int(env["SLURM_NTASKS"])
            nodes = int(env["SLURM_STEP_NUM_NODES"])
            return cls(
                rank=int(env["SLURM_PROCID"]),
                size=size,
                local_rank=int(env["SLURM_LOCALID"]),
                local_size=size // nodes,
            )
        return cls(
            rank=int(env["RANK"]),
            size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            local_size=int(env["LOCAL_WORLD_SIZE"]),
        )

    def variables(self) -> dict[str, str]:
        """Return the environment variables of torchrun, whoever started the rank."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
        }


class _SignalForwarder:
    """Keeps the last stop signal and sends it to the child, again and again.

    A signal that comes before the child handles it is ignored there, so once is not enough.
    """

    def __init__(self) -> None:
        self._last_signal: int | None = None
        for number in FORWARDED:
            signal.signal(number, self._keep)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self._last_signal = number

    def wait(self, child: subprocess.Popen[bytes]) -> int:
        """Return the exit code of the child, or minus the signal that ended it."""
        last_sent = 0.0
        while True:
            try:
                return child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                due = time.monotonic() - last_sent > _REPEAT_SECONDS
                if self._last_signal is not None and due:
                    child.send_signal(self._last_signal)
                    last_sent = time.monotonic()


def _prepare_child(ignore_signals: bool) -> None:
    """Set up the child: it ends with this process.

    With `ignore_signals`, stop signals are ignored until the child installs its own handlers.
    """
    action = signal.SIG_IGN if ignore_signals else signal.SIG_DFL
    for number in FORWARDED:
        signal.signal(number, action)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def last_message(log: Path) -> str | None:
    """Return the last line of a log that says why a command ended; None: no line does."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    # How the last line of every `llada` command begins that did not finish.
    beginnings = ("failed: ", "error: ", "not finished: ", "interrupted")
    for line in reversed(lines):
        if line.startswith(beginnings):
            return line[:500]
    return None


def _take_report(path: Path) -> FailureKind | None:
    """Read and remove the kind of failure that the child reported."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    with suppress(OSError):
        path.unlink()
    kinds: tuple[FailureKind, ...] = get_args(FailureKind)
    for kind in kinds:
        if kind == text:
            return kind
    return None


def _write_record(path: Path, fields: dict[str, object]) -> None:
    """Write a small JSON file with host and time."""
    record = {"host": socket.gethostname(), "time": time.time(), **fields}
    write_atomically(path, json.dumps(record))


if __name__ == "__main__":
    sys.exit(main())

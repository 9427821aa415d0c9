"""The parent process of a rank, which srun or torchrun starts.

It prepares the environment, runs the rank's command as a child and records how the child ended. A
separate process can record every end, even by SIGKILL or a crash of the interpreter, and can repeat
signals until the child handles them. Standard library only.
"""

from __future__ import annotations

import argparse
import ctypes
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

from launch.job import affinity
from launch.job.failure import CLEAN_EXITS, classify
from llada.failures import REPORT_VARIABLE, Report, read_report
from llada.files import write_json
from llada.process_rank import launched_rank

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_REPEAT_SECONDS = 2.0
_LOG_TAIL_BYTES = 1 << 16
_LONGEST_MESSAGE = 500
_PR_SET_PDEATHSIG = 1
"""prctl option: the signal that a process gets when its parent ends."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank; returns 0 if it exited cleanly, otherwise 1.

    Writes the records rank_NNNNN.start.json and rank_NNNNN.exit.json.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--bind", action="store_true")
    parser.add_argument("--ignore-early-signals", action="store_true")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)

    # Before anything that takes time: a signal may come at any moment.
    forwarder = _SignalForwarder()
    rank = launched_rank()
    record_path = options.folder / f"rank_{rank.rank:05d}"
    report = record_path.with_suffix(".failure")
    environment = {**os.environ, **rank.variables(), REPORT_VARIABLE: str(report)}
    if options.bind:
        # Count the cores before binding reduces them.
        environment["LLADA_THREADS"] = str(_cores_per_rank(rank.local_world_size))
        affinity.bind(rank.local_rank, rank.local_world_size)
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
            preexec_fn=lambda: _prepare_child(options.ignore_early_signals),
        )
    code = forwarder.wait(child)
    message = last_message(log_path)
    reported = _take_report(report)
    fields: dict[str, object] = {"code": code, "message": message}
    if reported is None:
        fields["kind"] = classify(code, message)
    else:
        fields["kind"] = classify(code, message, reported.kind)
        fields["training_step"] = reported.step
    _write_record(record_path.with_suffix(".exit.json"), fields)
    if code in CLEAN_EXITS:
        # torchrun takes any other code for a failure and kills the other ranks.
        return 0
    return 1


def _cores_per_rank(local_size: int) -> int:
    """Number of cores for each rank: what Slurm granted it, or its share of the machine."""
    cores = len(os.sched_getaffinity(0))
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if granted.isdigit() and int(granted) > 0:
        return min(int(granted), cores)
    return max(1, cores // local_size)


class _SignalForwarder:
    """Forwards the last stop signal to the child, again and again.

    Sending it once is not enough: the child ignores it until it has installed its handlers.
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
                is_due = time.monotonic() - last_sent > _REPEAT_SECONDS
                if self._last_signal is not None and is_due:
                    child.send_signal(self._last_signal)
                    last_sent = time.monotonic()


def _prepare_child(ignore_early_signals: bool) -> None:
    """Set up the child, before its command starts: it is killed when this process ends.

    Args:
        ignore_early_signals: ignore stop signals until the command installs its own handlers.
    """
    action = signal.SIG_DFL
    if ignore_early_signals:
        action = signal.SIG_IGN
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
    # The last line of a `llada` command that did not finish begins like this.
    beginnings = ("failed: ", "error: ", "not finished: ", "interrupted")
    for line in reversed(lines):
        if line.startswith(beginnings):
            return line[:_LONGEST_MESSAGE]
    return None


def _take_report(path: Path) -> Report | None:
    """Read and remove what the child reported about its failure."""
    report = read_report(path)
    with suppress(OSError):
        path.unlink()
    return report


def _write_record(path: Path, fields: dict[str, object]) -> None:
    """Write a small JSON file, with the host and the time added."""
    record = {"host": socket.gethostname(), "time": time.time(), **fields}
    write_json(path, record)


if __name__ == "__main__":
    sys.exit(main())

"""What srun or torchrun starts for every rank: it prepares the place, runs the command as a child,
and writes down how that ended.

Standard library only. A parent of its own can record every end, SIGKILL and a crash of the
interpreter included, and can hold back signals until the child handles them.
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
from pathlib import Path
from types import FrameType
from typing import Any

from launch.job import affinity

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CLEAN_EXITS = (0, 75)
"""Exit codes of a child that ended when all agreed to: the launcher must not take them for a
failure and kill the others.
"""
_REPEAT_SECONDS = 2.0
_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank; returns 0 for an end in order, else 1. The records are rank_NNNNN.start.json
    and rank_NNNNN.exit.json.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--bind", action="store_true")
    parser.add_argument("--default-signals", action="store_true")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    forward = _Forward()
    place = RankEnvironment.of_this_process()
    environment = place.environment()
    if options.bind:
        environment["LLADA_THREADS"] = str(_threads(place.local_size))
        affinity.bind(place.local_rank, place.local_size)
    name = f"rank_{place.rank:05d}"
    _record(
        options.folder / f"{name}.start.json",
        {"pid": os.getpid(), "step": os.environ.get("SLURM_STEP_ID")},
    )
    with open(options.folder / f"{name}.log", "ab", buffering=0) as log:
        child = subprocess.Popen(
            options.command,
            cwd=options.directory,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: _prepare_child(not options.default_signals),
        )
    code = forward.wait(child)
    message = last_message(options.folder / f"{name}.log")
    _record(options.folder / f"{name}.exit.json", {"code": code, "message": message})
    return 0 if code in CLEAN_EXITS else 1


def _threads(local_size: int) -> int:
    """Cores that a rank has to itself: those Slurm gave it, or its share of those that the ranks of
    this machine share.
    """
    cores = len(os.sched_getaffinity(0))
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return (
        min(int(given), cores)
        if given.isdigit() and int(given) > 0
        else max(1, cores // local_size)
    )


class RankEnvironment:
    """Which rank this is, from torchrun's or Slurm's variables."""

    def __init__(self, rank: int, size: int, local_rank: int, local_size: int) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size

    @classmethod
    def of_this_process(cls) -> RankEnvironment:
        env = os.environ
        # Slurm's first: those of torchrun could be left over in the environment that was submitted
        # from.
        if "SLURM_STEP_ID" in env and "LLADA_LOCAL" not in env:
            size, nodes = int(env["SLURM_NTASKS"]), int(env["SLURM_STEP_NUM_NODES"])
            return cls(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), size // nodes)
        return cls(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env["LOCAL_RANK"]),
            int(env["LOCAL_WORLD_SIZE"]),
        )

    def environment(self) -> dict[str, str]:
        """torchrun's names, whoever started this."""
        names = {
            "RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_size,
        }
        return {name: str(value) for name, value in names.items()}


class _Forward:
    """Keeps stop signals and hands them to the child, again and again: one that comes before the
    child handles it is ignored there.
    """

    def __init__(self) -> None:
        self._last: int | None = None
        for number in FORWARDED:
            signal.signal(number, self._keep)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self._last = number

    def wait(self, child: subprocess.Popen[bytes]) -> int:
        """The exit code of the child, or minus the signal that ended it."""
        sent = 0.0
        while True:
            try:
                return child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if self._last is not None and time.monotonic() - sent > _REPEAT_SECONDS:
                    child.send_signal(self._last)
                    sent = time.monotonic()


def _prepare_child(quiet: bool) -> None:
    """Do not outlive this process; `quiet`: ignore the stop signals until the child installs its
    own handlers.
    """
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN if quiet else signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)


def last_message(log: Path) -> str | None:
    """The last line of a log that says why a command ended."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    starts = ("failed: ", "error: ", "not finished: ", "interrupted")
    return next((line[:500] for line in reversed(lines) if line.startswith(starts)), None)


def _record(path: Path, fields: dict[str, Any]) -> None:
    """A small JSON file with host and time, there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        json.dumps({"host": socket.gethostname(), "time": time.time(), **fields}), encoding="utf-8"
    )
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())

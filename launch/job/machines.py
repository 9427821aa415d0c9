"""Where ranks run: the nodes of a Slurm job (srun), or this machine (torchrun). Standard library
only.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch import slurm
from launch.job.attempt import end_process, ended_tasks
from launch.job.spec import JobSpec
from llada.errors import RunError

_PORTS = range(20000, 30000)
"""Below the range from which systems take ports for outgoing connections."""
_QUIET = ["/bin/sh", "-c", "trap '' TERM INT USR1; exec \"$@\"", "sh"]
"""A signal that comes before Python handles it is ignored (and sent again), not deadly."""


class SlurmNodes:
    """The nodes of the job that this process is the batch script of."""

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        # Steps are named by the number that each task of an array has of its own.
        self.job_number = os.environ["SLURM_JOB_ID"]
        self.hosts = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])

    def start(
        self, command: Sequence[str], ranks: int, folder: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """srun, with the first node of the list as master: rank 0 is there, and so is this process,
        which finds the port.
        """
        spec = self._spec
        environment = {
            **environment,
            "MASTER_ADDR": self.hosts[0],
            "MASTER_PORT": str(free_port(int(self.job_number))),
        }
        # The batch script's own binding is not meant for this step.
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith("SLURM_CPU_BIND")
        }
        words = [
            "srun",
            f"--nodes={spec.nodes}",
            f"--ntasks={ranks}",
            f"--ntasks-per-node={spec.tasks_per_node}",
            # Ranks of a node follow each other: tensor-parallel ranks talk most.
            "--distribution=block",
            # The ranks say themselves how they end; nobody is killed for it before the others have
            # had their say.
            "--kill-on-bad-exit=0",
            "--wait=0",
            "--unbuffered",
            "--export=ALL",
            f"--chdir={spec.code}",
            *spec.srun,
        ]
        words += rank_words(spec, folder, command, spec.bind)
        with open(folder / "launcher.log", "ab") as log:
            # Signals of the job's end are for this process to hand on: srun must not end before its
            # ranks.
            return subprocess.Popen(
                words,
                env={**inherited, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_ignore_stops,
            )

    def deliver(self, name: str, starts: list[dict[str, Any]]) -> None:
        """Signal every task of the step."""
        with suppress(RunError):  # tried again while the ranks live
            slurm.send_signal(name, f"{self.job_number}.{starts[0]['step']}")

    def kill(self, process: subprocess.Popen[bytes], starts: list[dict[str, Any]]) -> None:
        """End the step; without a single rank there is only srun to end."""
        if starts:
            with suppress(RunError):
                slurm.send_signal("KILL", f"{self.job_number}.{starts[0]['step']}")
            end_process(process)
        else:
            process.kill()

    def gone(self, starts: list[dict[str, Any]], launcher_log: str) -> dict[int, str]:
        """What srun says: it hears at once of a task that ended."""
        return ended_tasks(launcher_log)


class ThisMachine:
    """Ranks of this machine, started by torch elastic."""

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self.hosts = [socket.gethostname()]

    def start(
        self, command: Sequence[str], ranks: int, folder: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """torchrun, out of the terminal's reach: Ctrl-C is for this process, which hands it on."""
        spec = self._spec
        words = [
            spec.python,
            "-m",
            "torch.distributed.run",
            "--nnodes=1",
            f"--nproc-per-node={ranks}",
            "--max-restarts=0",
        ]
        words += [
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
            f"--rdzv-id={os.getpid()}",
            "--no-python",
        ]
        words += rank_words(spec, folder, command, spec.bind and ranks > 1)
        with open(folder / "launcher.log", "ab") as log:
            return subprocess.Popen(
                words,
                cwd=spec.code,
                env={**os.environ, **environment, "LLADA_LOCAL": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def deliver(self, name: str, starts: list[dict[str, Any]]) -> None:
        """Signal every rank's parent, which hands it on."""
        for entry in starts:
            with suppress(ProcessLookupError):
                os.kill(entry["pid"], signal.Signals[f"SIG{name}"])

    def kill(self, process: subprocess.Popen[bytes], starts: list[dict[str, Any]]) -> None:
        """End the ranks, then torchrun."""
        self.deliver("KILL", starts)
        end_process(process)

    def gone(self, starts: list[dict[str, Any]], launcher_log: str) -> dict[int, str]:
        """Parents that no longer run on this machine."""
        return _without_process(starts)


class OneProcess:
    """A command of one process beside the batch script; in a container of pyxis a job step of its
    own.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self.hosts = [socket.gethostname()]

    def start(
        self, command: Sequence[str], ranks: int, folder: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """The command, as rank 0 of 1."""
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "LLADA_LOCAL": "1",
        }
        step = (
            [
                "srun",
                "--nodes=1",
                "--ntasks=1",
                "--kill-on-bad-exit=0",
                "--export=ALL",
                *self._spec.srun,
            ]
            if self._spec.srun
            else []
        )
        words = [*step, *rank_words(self._spec, folder, command, bind=False)]
        with open(folder / "launcher.log", "ab") as log:
            environment = {**os.environ, **environment, **alone}
            return subprocess.Popen(
                words,
                cwd=self._spec.code,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_ignore_stops,
            )

    def deliver(self, name: str, starts: list[dict[str, Any]]) -> None:
        """SIGTERM, whatever was asked: what it is doing is done again from where it was."""
        for entry in starts:
            with suppress(ProcessLookupError):
                os.kill(entry["pid"], signal.SIGTERM)

    def kill(self, process: subprocess.Popen[bytes], starts: list[dict[str, Any]]) -> None:
        """End it at once; its child does not outlive it."""
        for entry in starts:
            with suppress(ProcessLookupError):
                os.kill(entry["pid"], signal.SIGKILL)
        process.kill()

    def gone(self, starts: list[dict[str, Any]], launcher_log: str) -> dict[int, str]:
        """The parent, if it no longer runs on this machine."""
        return _without_process(starts)


def rank_words(spec: JobSpec, folder: Path, command: Sequence[str], bind: bool) -> list[str]:
    """What starts a rank: into the container, to the parent of the command."""
    words = [
        *_QUIET,
        *spec.container,
        spec.python,
        "-m",
        "launch.job.rank",
        "--folder",
        str(folder),
        "--directory",
        spec.directory,
    ]
    return [
        *words,
        *(["--bind"] if bind else []),
        *([] if spec.quiet else ["--default-signals"]),
        "--",
        *command,
    ]


def _without_process(starts: list[dict[str, Any]]) -> dict[int, str]:
    gone = {}
    for entry in starts:
        try:
            os.kill(entry["pid"], 0)
        except ProcessLookupError:
            gone[entry["rank"]] = f"process {entry['pid']} is gone"
    return gone


def free_port(seed: int, host: str = "") -> int:
    """A port nobody listens on now; another one for another job, so that two jobs that share a node
    do not meet.
    """
    for offset in range(len(_PORTS)):
        port = _PORTS[(seed * 7 + offset) % len(_PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
                return port
            except OSError:
                continue
    raise RunError(f"no free port between {_PORTS[0]} and {_PORTS[-1]} on {socket.gethostname()}")


def _ignore_stops() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

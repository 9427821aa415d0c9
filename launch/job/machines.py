"""Where ranks run: the nodes of a Slurm job (srun), or this machine (torchrun).

Standard library only.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from launch import slurm
from launch.job.records import RankStart, ended_tasks
from launch.job.spec import JobSpec
from llada.errors import RunError
from llada.process_rank import ALONE, LOCAL_LAUNCH_VARIABLE

LAUNCHER_LOG = "launcher.log"
_PORTS = range(20000, 30000)
"""Ports below the range that systems use for outgoing connections."""
_IGNORE_SIGNALS = ["/bin/sh", "-c", "trap '' TERM INT USR1; exec \"$@\"", "sh"]
"""Prefix of a rank's command. A stop signal would end Python before it has installed its handlers;
with this prefix it is ignored until then. It is sent again later.
"""
_KILL_SECONDS = 120.0
"""Seconds that srun or torchrun has to exit after its ranks were killed."""


@dataclass(frozen=True)
class RankCommand:
    """A command that every rank runs.

    Attributes:
        words: program and arguments.
        ranks: number of ranks.
        folder: existing folder for the ranks' logs and records.
        environment: further environment variables of the ranks.
    """

    words: Sequence[str]
    ranks: int
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)


class Machine(Protocol):
    """Where ranks run: nodes of a Slurm job, or this machine."""

    hosts: list[str]

    def start(self, command: RankCommand) -> subprocess.Popen[bytes]:
        """Start every rank; returns srun or torchrun, which exits after the last rank."""

    def signal_ranks(self, name: str, starts: list[RankStart]) -> None:
        """Send a signal, for example USR1, to every rank."""

    def kill(self, process: subprocess.Popen[bytes], starts: list[RankStart]) -> None:
        """Kill every rank."""

    def dead_parents(self, starts: list[RankStart], launcher_log: str) -> dict[int, str]:
        """Return the ranks whose parent process is gone, each with how that process ended.

        The parent may have been killed before it could record how its rank ended.
        """


class SlurmNodes:
    """The nodes of the Slurm job that this process is the batch script of."""

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        # This number names the job steps. Every task of an array has a number of its own.
        self.job_number = os.environ["SLURM_JOB_ID"]
        self.hosts = slurm.expand_hostnames(os.environ["SLURM_JOB_NODELIST"])

    def start(self, command: RankCommand) -> subprocess.Popen[bytes]:
        """Start srun.

        The first node of the list is the master: rank 0 runs there. So does this process, which can
        therefore choose a free port.
        """
        spec = self._spec
        # The CPU binding of the batch script does not apply to the ranks.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("SLURM_CPU_BIND")
        }
        master = {
            "MASTER_ADDR": self.hosts[0],
            "MASTER_PORT": str(free_port(int(self.job_number))),
        }
        words = [
            "srun",
            f"--nodes={spec.nodes}",
            f"--ntasks={command.ranks}",
            f"--ntasks-per-node={spec.tasks_per_node}",
            # Consecutive ranks share a node: tensor-parallel ranks communicate most.
            "--distribution=block",
            # When a rank fails, srun leaves the others alone: they still write their own messages,
            # and the supervisor ends them.
            "--kill-on-bad-exit=0",
            "--wait=0",
            "--unbuffered",
            "--export=ALL",
            f"--chdir={spec.code}",
            *spec.srun,
            *rank_words(spec, command, spec.bind),
        ]
        with open(command.folder / LAUNCHER_LOG, "ab") as log:
            return subprocess.Popen(
                words,
                env={**inherited, **command.environment, **master},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # srun must not exit before its ranks. This process forwards the signals to them.
                preexec_fn=slurm.ignore_stop_signals,
            )

    def signal_ranks(self, name: str, starts: list[RankStart]) -> None:
        """Signal every task of the job step."""
        # The caller repeats the signal as long as ranks are running.
        with suppress(RunError):
            slurm.send_signal(name, self._step(starts))

    def kill(self, process: subprocess.Popen[bytes], starts: list[RankStart]) -> None:
        """Kill the job step; if no rank has started, only srun."""
        if not starts:
            process.kill()
            return
        self.signal_ranks("KILL", starts)
        end_process(process)

    def dead_parents(self, starts: list[RankStart], launcher_log: str) -> dict[int, str]:
        """Return the tasks that failed according to srun, which reports them at once."""
        return ended_tasks(launcher_log)

    def _step(self, starts: list[RankStart]) -> str:
        return f"{self.job_number}.{starts[0].step}"


class ThisMachine:
    """This machine, on which torchrun starts the ranks."""

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self.hosts = [socket.gethostname()]

    def start(self, command: RankCommand) -> subprocess.Popen[bytes]:
        """Start torchrun in a session of its own, so that only this process gets Ctrl-C."""
        spec = self._spec
        words = [
            spec.python,
            "-m",
            "torch.distributed.run",
            "--nnodes=1",
            f"--nproc-per-node={command.ranks}",
            # The supervisor restarts the ranks.
            "--max-restarts=0",
            "--rdzv-backend=c10d",
            # Port 0: any free port.
            "--rdzv-endpoint=localhost:0",
            f"--rdzv-id={os.getpid()}",
            "--no-python",
            *rank_words(spec, command, spec.bind and command.ranks > 1),
        ]
        with open(command.folder / LAUNCHER_LOG, "ab") as log:
            return subprocess.Popen(
                words,
                cwd=spec.code,
                env={**os.environ, **command.environment, LOCAL_LAUNCH_VARIABLE: "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def signal_ranks(self, name: str, starts: list[RankStart]) -> None:
        """Signal the parent of every rank, which forwards the signal."""
        _signal_parents(starts, signal.Signals[f"SIG{name}"])

    def kill(self, process: subprocess.Popen[bytes], starts: list[RankStart]) -> None:
        """Kill the ranks; torchrun then exits."""
        _signal_parents(starts, signal.SIGKILL)
        end_process(process)

    def dead_parents(self, starts: list[RankStart], launcher_log: str) -> dict[int, str]:
        """Return the parents that no longer run."""
        return _missing_processes(starts)


class OneProcess:
    """A command of one process on the node of the batch script.

    In a pyxis container, the command is a job step of its own.
    """

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self.hosts = [socket.gethostname()]

    def start(self, command: RankCommand) -> subprocess.Popen[bytes]:
        """Start the command as rank 0 of 1."""
        spec = self._spec
        step = []
        if spec.srun:
            step = ["srun", "--nodes=1", "--ntasks=1", "--kill-on-bad-exit=0", "--export=ALL"]
        environment = {
            **os.environ,
            **command.environment,
            **ALONE.variables(),
            # Do not read the rank from Slurm's variables, which are those of the batch script.
            LOCAL_LAUNCH_VARIABLE: "1",
        }
        with open(command.folder / LAUNCHER_LOG, "ab") as log:
            return subprocess.Popen(
                [*step, *spec.srun, *rank_words(spec, command, bind=False)],
                cwd=spec.code,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=slurm.ignore_stop_signals,
            )

    def signal_ranks(self, name: str, starts: list[RankStart]) -> None:
        """Send SIGTERM, whatever `name` says: the command then exits and keeps finished work."""
        _signal_parents(starts, signal.SIGTERM)

    def kill(self, process: subprocess.Popen[bytes], starts: list[RankStart]) -> None:
        """Kill the command's parent, which the command does not outlive."""
        _signal_parents(starts, signal.SIGKILL)
        process.kill()

    def dead_parents(self, starts: list[RankStart], launcher_log: str) -> dict[int, str]:
        """Return the parent if it no longer runs."""
        return _missing_processes(starts)


def rank_words(spec: JobSpec, command: RankCommand, bind: bool) -> list[str]:
    """Return the command that starts a rank's parent process, in the container if there is one."""
    words = [
        *_IGNORE_SIGNALS,
        *spec.container,
        spec.python,
        "-m",
        "launch.job.rank",
        "--folder",
        str(command.folder),
        "--directory",
        spec.directory,
    ]
    if bind:
        words.append("--bind")
    if spec.ignore_early_signals:
        words.append("--ignore-early-signals")
    return [*words, "--", *command.words]


def _signal_parents(starts: list[RankStart], number: signal.Signals) -> None:
    for start in starts:
        with suppress(ProcessLookupError):
            os.kill(start.pid, number)


def _missing_processes(starts: list[RankStart]) -> dict[int, str]:
    missing = {}
    for start in starts:
        try:
            # Signal 0 only asks whether the process exists.
            os.kill(start.pid, 0)
        except ProcessLookupError:
            missing[start.rank] = f"process {start.pid} is gone"
    return missing


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Wait for srun or torchrun after its ranks were killed, and kill it if it does not exit."""
    try:
        process.wait(_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port(seed: int, host: str = "") -> int:
    """Return a port that no process listens on now.

    The first port that is tried depends on `seed`, the job's number, so that two jobs on the same
    node do not choose the same one.
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

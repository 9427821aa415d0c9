"""One attempt, with stand-ins for srun and for the ranks' records."""

from __future__ import annotations

import compileall
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launch.job.attempt import StopState, run_ranks
from launch.job.failure import classify
from launch.job.machines import OneProcess, RankCommand, ThisMachine
from launch.job.policy import Decision, Situation, decide
from launch.job.records import AttemptEnd, RankStart, ended_tasks
from launch.job.spec import STOP_FILE, JobSpec, Restarts
from launch.job.supervisor import Supervisor
from launch.submit.snapshot import take_snapshot
from llada import events
from llada.training.signals import StopRequest

LIMITS = Restarts(grace=0.1)
KILLED = "srun: error: n1: task 1: Killed\n"


@dataclass
class FakeMachine:
    """Two ranks on two nodes: `files` appear in the folder, then srun runs until it is killed.

    Attributes:
        files: name -> content; launcher.log is what srun prints.
        ends: srun ends by itself.
        words: a command in srun's place.
    """

    files: dict[str, str]
    ends: bool = False
    hosts: list[str] = field(default_factory=lambda: ["n0", "n1"])
    kills: int = 0
    words: list[str] | None = None

    def start(self, command: RankCommand) -> subprocess.Popen[bytes]:
        for name, text in self.files.items():
            (command.folder / name).write_text(text)
        words = ["true"] if self.ends else ["sleep", "600"]
        return subprocess.Popen(self.words or words)

    def signal_ranks(self, name: str, starts: list[RankStart]) -> None: ...

    def kill(self, process: subprocess.Popen[bytes], starts: list[RankStart]) -> None:
        self.kills += 1
        process.kill()

    def dead_parents(self, starts: list[RankStart], launcher_log: str) -> dict[int, str]:
        return ended_tasks(launcher_log)


def started(rank: int) -> dict[str, str]:
    return {
        f"rank_{rank:05d}.start.json": json.dumps(
            {"host": f"n{rank}", "time": 1.0, "pid": 1, "step": "0"}
        )
    }


def ended(rank: int, code: int, message: str | None = None) -> dict[str, str]:
    record = {
        "host": f"n{rank}",
        "time": 2.0,
        "code": code,
        "message": message,
        "kind": classify(code, message),
    }
    return {f"rank_{rank:05d}.exit.json": json.dumps(record)}


def run(machine: FakeMachine, folder: Path) -> AttemptEnd:
    stop = StopState(StopRequest(), folder / STOP_FILE)
    return run_ranks(machine, RankCommand([], 2, folder), stop, LIMITS)


def test_srun_reports_ended_tasks() -> None:
    text = (
        "srun: error: n1: task 1: Killed\nsrun: error: n[2-3]: tasks 2,4-5: Out Of"
        " Memory\nslurmstepd: error: Detected 1 oom-kill event(s)\nsrun: error: n0: task 0: Exited"
        " with exit code 1\n"
    )
    assert ended_tasks(text) == {
        0: "srun: Exited with exit code 1",
        1: "srun: Killed",
        2: "srun: Out Of Memory",
        4: "srun: Out Of Memory",
        5: "srun: Out Of Memory",
    }


@pytest.mark.parametrize(
    "others, ends",
    [
        ({}, False),
        (ended(0, 1, "failed: RuntimeError: Connection reset by peer"), False),
        ({}, True),
    ],
    ids=["the other rank waits for it", "the other rank noticed", "both are over"],
)
def test_a_parent_that_is_killed_with_its_rank_is_named(
    tmp_path: Path, others: dict[str, str], ends: bool
) -> None:
    """Nobody is left to write rank 1's record; srun hears of it."""
    machine = FakeMachine({**started(0), **started(1), **others, "launcher.log": KILLED}, ends)
    end = run(machine, tmp_path)
    assert machine.kills == (0 if ends else 1)
    reason = (
        "rank 1 on n1: killed together with its parent process (srun: Killed); running out of"
        " memory can cause this"
    )
    assert decide(end, Situation(), LIMITS).reason == reason


def test_tasks_that_the_launcher_killed_are_not_to_blame(tmp_path: Path) -> None:
    machine = FakeMachine({**started(0), **started(1), **ended(0, 1, "failed: OSError: disk")})

    def kill(process: subprocess.Popen[bytes], starts: list[RankStart]) -> None:
        (tmp_path / "launcher.log").write_text(KILLED)
        process.kill()

    machine.kill = kill  # type: ignore[method-assign]
    end = run(machine, tmp_path)
    assert [rank.rank for rank in end.exits] == [0]
    assert decide(end, Situation(), LIMITS).reason == "rank 0 on n0: OSError: disk"


@pytest.mark.parametrize("make", [ThisMachine, OneProcess])
def test_a_parent_of_this_machine_is_looked_for(make: Callable[[JobSpec], Any]) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    machine = make(JobSpec("task", "", "", "", [], sys.executable))
    starts = [RankStart(0, "here", os.getpid()), RankStart(1, "here", process.pid)]
    assert machine.dead_parents(starts, "") == {1: f"process {process.pid} is gone"}


def test_a_parent_killed_with_its_rank_ends_a_single_process_too(tmp_path: Path) -> None:
    machine = OneProcess(
        JobSpec(
            "task", str(tmp_path), str(tmp_path), str(Path(__file__).parents[2]), [], sys.executable
        )
    )
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)"
    stop = StopState(StopRequest(), tmp_path / STOP_FILE)
    command = RankCommand([sys.executable, "-c", code], 1, tmp_path)
    end = run_ranks(machine, command, stop, LIMITS)
    failure = end.first_failure
    assert failure is not None and failure.parent_end is not None
    assert failure.code == -signal.SIGKILL and failure.kind == "killed"


def test_ranks_do_not_outlive_the_process_that_started_them(tmp_path: Path) -> None:
    """After torchrun is killed they would train on, and hold the run folder's lock."""
    output = "Setting OMP_NUM_THREADS environment variable for each process to be 1 in default\n"
    machine = FakeMachine(
        {**started(0), **started(1), "launcher.log": output}, words=["sh", "-c", "kill -9 $$"]
    )
    end = run(machine, tmp_path)
    assert machine.kills == 1 and not end.killed
    reason = (
        "rank 0, 1: disappeared without a record (the process that started the ranks was killed by"
        " SIGKILL)"
    )
    assert decide(end, Situation(), LIMITS).reason == reason


def test_a_stop_of_the_last_moment_is_seen_by_the_decision(tmp_path: Path) -> None:
    """`llada stop` touches a file and signals the ranks, which may end before the next look."""
    spec = JobSpec("train", str(tmp_path), str(tmp_path), str(tmp_path), [], sys.executable)
    (tmp_path / "job.json").write_text(spec.to_json())
    supervisor = Supervisor(tmp_path, StopRequest(), local=True)
    deadline = time.monotonic() + 60
    assert not supervisor.stop_state.requested_by_user()
    (tmp_path / STOP_FILE).touch()
    situation = supervisor._situation(Situation(), ThisMachine(spec))
    assert situation.stopped_by_user and time.monotonic() < deadline


def test_a_stop_between_the_decision_and_the_requeue_is_seen(tmp_path: Path) -> None:
    spec = JobSpec("train", str(tmp_path), str(tmp_path), str(tmp_path), [], sys.executable)
    (tmp_path / "job.json").write_text(spec.to_json())
    supervisor = Supervisor(tmp_path, StopRequest(), local=True)
    supervisor.job = "12"
    assert not supervisor.stop_state.requested_by_user()
    (tmp_path / STOP_FILE).touch()
    # Otherwise it would ask Slurm, which is not here.
    supervisor._requeue(Decision("requeued", "SIGUSR1: stopped with a checkpoint"))
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["reason"]) == ("stopped", "as requested, before the next start")


def test_the_next_attempt_reads_the_key_of_a_failure_from_the_events(tmp_path: Path) -> None:
    spec = JobSpec("train", str(tmp_path), str(tmp_path), str(tmp_path), [], sys.executable)
    (tmp_path / "job.json").write_text(spec.to_json())
    supervisor = Supervisor(tmp_path, StopRequest(), local=True)
    supervisor.attempt = 1
    supervisor._report(Decision("requeued", "step 812: loss 301.7", "step", "step 812"))
    supervisor.attempt = 2
    situation = supervisor._situation_at_start()
    assert (situation.failures, situation.last_key) == (1, "step 812")


def test_a_snapshot_holds_valid_bytecode(tmp_path: Path) -> None:
    """Else every rank would compile the whole package again, at every launch."""
    compileall.compile_file(str(Path(events.__file__)), quiet=1)
    code = take_snapshot(tmp_path / "code")
    (copy,) = (code / "llada" / "__pycache__").glob(f"events.{sys.implementation.cache_tag}.pyc")
    # PEP 552: what Python compares with the source.
    modified, size = struct.unpack("<II", copy.read_bytes()[8:16])
    source = (code / "llada" / "events.py").stat()
    assert (modified, size) == (int(source.st_mtime), source.st_size)

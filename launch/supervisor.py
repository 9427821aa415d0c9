"""The batch script of a job, in Python: starts the ranks, hands on signals, writes down what happens, and starts the job again.

Standard library only, and its signal handlers stand before anything else is imported that takes time.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch import job as jobs
from launch import scheduler
from launch.attempt import Machine, StepEnd, run_ranks
from launch.decide import Decision, JobState, Situation, decide, failures_in_a_row, restart, this_launch
from launch.job import JobSpec
from launch.machines import SlurmNodes, ThisMachine
from launch.preflight_rules import judge, to_environment
from llada import events
from llada.errors import RunError
from llada.events import EventLog
from llada.training.signals import StopRequest


class Supervisor:
    """One launch of a run, over all its attempts that this process sees: one in Slurm, as many as it takes on this machine.

    Args:
        folder: RUN/launch/NNNN.
        stop: asked to stop when true.
        local: on this machine instead of in a Slurm job.
    """

    def __init__(self, folder: Path, stop: StopRequest, local: bool) -> None:
        self.folder, self.stop, self.local = folder, stop, local
        self.spec = JobSpec.read(folder)
        self.state = Path(self.spec.state)
        task = os.environ.get("SLURM_ARRAY_TASK_ID") if self.spec.array else None
        self.task = int(task) if task is not None else None
        self.job = None if local else scheduler.own_job()
        self.log = EventLog(self.state)
        self.attempt = 0

    def run(self) -> int:
        """Exit code of the job."""
        while True:
            decision = self._guarded_attempt()
            self._write(
                decision.event,
                reason=decision.reason or None,
                failure=decision.failure or None,
                excluded=decision.exclude or None,
                delay=decision.delay or None,
                step=jobs.latest_checkpoint(self.state) if self.spec.kind == "train" else None,
            )
            print(f"llada: {decision.event}{': ' if decision.reason else ''}{decision.reason}", flush=True)
            if decision.event != "requeued":
                self._end_chain(decision)
                return decision.code
            if decision.by_slurm:
                return decision.code
            if self.local:
                self._sleep(decision.delay)
                if self.stop or self._wanted():
                    self._write("stopped", reason="as asked, before the next start")
                    return decision.code
                continue
            return self._again(decision)

    def _guarded_attempt(self) -> Decision:
        """One attempt; trouble of this process itself (a file server that is away) is a failure like a rank's, and may be tried again."""
        try:
            return self._attempt()
        except (OSError, RunError, ValueError) as error:
            traceback.print_exc()
            failures, last = failures_in_a_row(events.read(self.state), self.attempt, self.task)
            reason = f"supervisor: {type(error).__name__}: {error}"
            return restart(reason, [], Situation(failures=failures, last=last, wanted=self._wanted()), self.spec.restarts)

    # -- one attempt ---------------------------------------------------------------------------------------------------

    def _attempt(self) -> Decision:
        parent = self.state / "logs" if self.task is None else self.state / "logs" / f"task-{self.task:05d}"
        self.attempt, logs = jobs.next_folder(parent, "attempt-{:04d}")
        failures, last = failures_in_a_row(events.read(self.state), self.attempt, self.task)
        machine = self._machine(self.spec)
        self._write("started", nodes=machine.hosts, ranks=self.spec.ranks, host=socket.gethostname(), logs=str(logs), pid=os.getpid())
        before = jobs.latest_checkpoint(self.state)
        limits = self.spec.restarts
        situation = Situation(failures=failures, last=last, wanted=self._wanted())
        if failures > limits.limit:  # the attempts before ended without a word, so that none could say so
            return restart(last or "", [], situation, limits)
        if self.spec.preflight is not None and self.spec.kind == "train" and not self._signal():
            refused = self._preflight(logs, situation)
            if refused is not None:
                return refused
        if self._signal():
            return decide(StepEnd([], self.spec.ranks, machine.hosts), self._situation(situation, before, machine), limits)
        end = self._task(logs) if self.spec.kind == "task" else self._ranks(machine, logs)
        return decide(end, self._situation(situation, before, machine), limits)

    def _machine(self, spec: JobSpec) -> Machine:
        return ThisMachine(spec) if self.local else SlurmNodes(spec)

    def _ranks(self, machine: Machine, logs: Path) -> StepEnd:
        command = [*self.spec.python, self.spec.code, *self.spec.command]
        return run_ranks(machine, command, self.spec.ranks, logs, self._environment(), self.stop, self.spec.restarts)

    def _task(self, logs: Path) -> StepEnd:
        """A command of a single process, of a job array or after a run."""
        words = [word.replace("{task}", str(self.task or 0)) for word in self.spec.command]
        command = [*self.spec.python, self.spec.code, *words]
        return run_ranks(_Here(self.spec), command, 1, logs, self._environment(), self.stop, self.spec.restarts)

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(part for part in (self.spec.code, os.environ.get("PYTHONPATH", "")) if part)
        return {**self.spec.environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "LLADA_ATTEMPT": str(self.attempt)}

    def _preflight(self, logs: Path, now: Situation) -> Decision | None:
        """Test the nodes; None: all is well."""
        # Where the user started it may be a checkout, whose packages -m would take for those of the snapshot.
        machine = self._machine(replace(self.spec, directory=self.spec.code))
        rules = self.spec.preflight
        assert rules is not None
        folder = logs / "preflight"
        folder.mkdir()
        command = [*self.spec.python, "-m", "launch.preflight", str(folder), str(self.state)]
        environment = {**self._environment(), "LLADA_PREFLIGHT": to_environment(rules)}
        limits = jobs.Restarts(start_timeout=self.spec.restarts.start_timeout, grace=rules["seconds"])
        started = time.time()
        end = run_ranks(machine, command, self.spec.ranks, folder, environment, StopRequest(), limits)
        verdict = judge(folder, machine.hosts, self.spec.tasks_per_node, rules, end)
        self._write("preflight", seconds=round(time.time() - started, 1), bad=verdict.bad or None, nodes=verdict.measured)
        for line in verdict.lines:
            print(f"llada: preflight: {line}", flush=True)
        if not verdict.bad or self._signal():
            return None
        reason = "preflight: " + "; ".join(f"{host}: {why}" for host, why in verdict.bad.items())
        if len(verdict.bad) * 2 > len(machine.hosts) and not end.absent:
            # Most nodes alike are no accident of one: the profile asks for what the machines do not have.
            return Decision("failed", f"{reason}; that is most of the nodes, so none is excluded", failure=True, code=1)
        return restart(reason, [] if self.local else list(verdict.bad), now, self.spec.restarts)

    # -- what Slurm and the user say -----------------------------------------------------------------------------------

    def _signal(self) -> str | None:
        return self.stop.signal

    def _signal_of_ranks(self) -> str | None:
        """The signal at which the ranks agreed to stop: before a preemption, Slurm may tell them alone."""
        own = [line for line in events.read(self.state) if line["event"] == "signal" and line.get("attempt") == self.attempt]
        return own[-1].get("signal") or "a signal" if own else None

    def _wanted(self) -> bool:
        return (self.folder / jobs.STOP).exists()

    def _situation(self, start: Situation, before: int, machine: Machine) -> Situation:
        signal = self._signal() or self._signal_of_ranks()
        state = self._job_state()  # first: a job that is being ended has half a minute
        gone: list[str] = []
        if not self.local:
            with suppress(RunError):
                gone = scheduler.unreachable(machine.hosts)
        return Situation(
            signal=signal,
            wanted=self._wanted() or (self.local and self._signal() is not None),
            state=state,
            progress=self.spec.kind == "train" and jobs.latest_checkpoint(self.state) > before,
            failures=start.failures,
            last=start.last,
            unreachable=gone,
        )

    def _job_state(self) -> JobState:
        """What Slurm is doing with this job. A job that is being ended shows as COMPLETING, whatever becomes of it."""
        if self.local or self.job is None:
            return "running"
        shown = scheduler.describe(self.job, patience=scheduler.PATIENCE)
        state = shown.get("JobState", "")
        if not state:
            return "unknown"
        if state == "RUNNING":
            return "running"
        if int(shown.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            return "requeued"
        if state == "TIMEOUT" or (state == "COMPLETING" and _seconds(shown.get("RunTime")) >= _seconds(shown.get("TimeLimit")) > 0):
            return "running"  # over its time, not cancelled: it may be put back into the queue
        return "cancelled"

    # -- the next start ------------------------------------------------------------------------------------------------

    def _again(self, decision: Decision) -> int:
        """Put this job back into the queue. Slurm then ends this process."""
        assert self.job is not None
        if not self.spec.restarts.requeue:
            return self._leave_to_chain(decision)
        self.stop.signal = None
        refused = scheduler.requeue(self.job)
        if refused is not None:
            reason = f"Slurm does not put the job back into the queue ({refused}); submit the run again, or use --chain"
            self._write("failed", reason=reason, failure=True)
            print(f"llada: failed: {reason}", flush=True)
            return 1
        self._wish(self.job, decision)
        self._sleep(30)  # until Slurm ends this process, so that the job's end is the requeue and no exit code
        return decision.code

    def _leave_to_chain(self, decision: Decision) -> int:
        """The next job of the chain goes on; without one, the run is left as it is."""
        sent = jobs.submitted(self.folder)
        ids = sent.jobs if sent is not None else []
        later = ids[ids.index(self.job) + 1 :] if self.job in ids else []
        if later:
            for job in later if decision.exclude else later[:1]:
                self._wish(job, decision)
            print(f"llada: job {later[0]} goes on", flush=True)
        else:
            reason = f"{decision.reason}; no job is left to go on (requeue.enabled is false): submit the run again"
            self._write("failed" if decision.failure else "stopped", reason=reason, failure=decision.failure or None)
        return decision.code

    def _wish(self, job: str, decision: Decision) -> None:
        """Tell Slurm when and where a job may start."""
        wishes = []
        if decision.delay:
            wishes.append(f"StartTime=now+{int(decision.delay)}")
        if decision.exclude:
            earlier = [host for line in this_launch(events.read(self.state)) for host in line.get("excluded", [])]
            wishes.append("ExcNodeList=" + ",".join(sorted({*self.spec.exclude, *earlier, *decision.exclude})))
        if wishes:
            refused = scheduler.update(job, *wishes)
            if refused is not None:
                print(f"llada: Slurm refused {' '.join(wishes)} of job {job}: {refused}", flush=True)

    def _end_chain(self, decision: Decision) -> None:
        """The jobs that would go on have nothing to do; the conversion waits for the one that finished."""
        sent = jobs.submitted(self.folder)
        if self.local or self.spec.kind != "train" or sent is None or len(sent.jobs) < 2:
            return
        with suppress(RunError):
            if sent.then is not None and decision.event == "finished":
                scheduler.update(sent.then, f"Dependency=afterok:{self.job}")
            scheduler.cancel(*(other for other in sent.jobs if other != self.job))

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._signal() and not (self.local and self._wanted()):
            time.sleep(0.2)

    def _write(self, event: str, **fields: Any) -> None:
        self.log.write(event, attempt=self.attempt, job=self.job, task=self.task, **fields)


class _Here:
    """A single process beside this one, in the batch script's own place."""

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self.hosts = [socket.gethostname()]

    def start(self, command: Sequence[str], ranks: int, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "LLADA_LOCAL": "1"}
        words = [*self._spec.python, "-m", "launch.rank", "--folder", str(folder), "--directory", self._spec.directory]
        words += ["--default-signals", "--", *command]
        with open(folder / "launcher.log", "ab") as log:
            environment = {**os.environ, **environment, **alone}
            return subprocess.Popen(words, cwd=self._spec.code, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def deliver(self, name: str, starts: list[dict[str, Any]]) -> None:
        ThisMachine(self._spec).deliver("TERM", starts)  # what it is doing is done again from where it was

    def kill(self, process: subprocess.Popen[bytes], starts: list[dict[str, Any]]) -> None:
        process.kill()


def _seconds(text: str | None) -> float:
    """Seconds of Slurm's D-HH:MM:SS; 0 for what is none (UNLIMITED)."""
    days, _, clock = (text or "").rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        return int(days or 0) * 86400 + sum(part * 60**power for power, part in enumerate(reversed(parts)))
    except ValueError:
        return 0.0


def main() -> int:
    """`python -m launch.supervisor RUN/launch/NNNN [--local]`, in the folder of the code."""
    stop = StopRequest().install()
    if os.environ.pop("LLADA_SIGNALLED", None):  # by the batch script, before this process stood
        stop.signal = "SIGUSR1"
    folder, *rest = sys.argv[1:]
    return Supervisor(Path(folder), stop, "--local" in rest).run()


if __name__ == "__main__":
    sys.exit(main())

"""The batch script of a job, in Python: starts the ranks, hands on signals, writes down what
happens, and starts the job again.

Standard library only. `launch.job.main` starts it.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch import slurm
from launch.job import spec as jobs
from launch.job.attempt import Machine, StepEnd, StopState, run_ranks
from launch.job.machines import OneProcess, SlurmNodes, ThisMachine
from launch.job.policy import (
    Decision,
    JobState,
    Situation,
    decide,
    failures_in_a_row,
    restart,
    this_launch,
)
from launch.job.spec import JobSpec
from launch.preflight.rules import judge, to_environment
from llada import events
from llada.errors import RunError
from llada.events import EventLog
from llada.training.signals import StopRequest

_EXCLUDED_SECONDS = 86400.0
"""A bad node is avoided for a day; until then somebody may have mended it."""


class Supervisor:
    """One launch of a run, over all its attempts that this process sees: one in Slurm, as many as
    it takes on this machine.

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
        self.job = None if local else slurm.own_job(self.spec.array)
        self.asked = StopState(stop, folder / jobs.STOP)
        self._end_time = float("inf")
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
                **({"host": socket.gethostname(), "pid": os.getpid()} if self.local else {}),
            )
            print(
                f"llada: {decision.event}{': ' if decision.reason else ''}{decision.reason}",
                flush=True,
            )
            if decision.event != "requeued":
                self._end_chain(decision)
                return decision.code
            if decision.by_slurm:
                return decision.code
            if self.local:
                self._sleep(decision.delay)
                if self.stop or self.asked.wanted_now:
                    self._write("stopped", reason="as asked, before the next start")
                    return decision.code
                continue
            return self._again(decision)

    def _guarded_attempt(self) -> Decision:
        """One attempt; trouble of this process itself (a file server that is away) is a failure
        like a rank's, and may be tried again.
        """
        try:
            return self._attempt()
        except Exception as error:  # whatever it is: the run must not end for it
            traceback.print_exc()
            failures, last = failures_in_a_row(events.read(self.state), self.attempt, self.task)
            reason = f"supervisor: {type(error).__name__}: {error}"
            return restart(
                reason,
                [],
                Situation(failures=failures, last=last, wanted=self.asked.wanted_now),
                self.spec.restarts,
            )

    # -- one attempt -------------------------------------------------------------------------------

    def _attempt(self) -> Decision:
        parent = (
            self.state / "logs"
            if self.task is None
            else self.state / "logs" / f"task-{self.task:05d}"
        )
        self.attempt, logs = jobs.next_folder(parent, "attempt-{:04d}")
        failures, last = failures_in_a_row(events.read(self.state), self.attempt, self.task)
        machine = self._machine(self.spec)
        self._write(
            "started",
            nodes=machine.hosts,
            ranks=self.spec.ranks,
            host=socket.gethostname(),
            logs=str(logs),
            pid=os.getpid(),
        )
        limits = self.spec.restarts
        situation = Situation(failures=failures, last=last, wanted=self.asked.wanted_now)
        # the attempts before ended without a word, so that none could say so
        if failures > limits.limit:
            return restart(last or "", [], situation, limits)
        self._end_time = self._ends_at()
        if self.spec.preflight is not None and self.spec.kind == "train" and not self.asked:
            refused = self._preflight(logs, situation)
            if refused is not None:
                return refused
        if self.asked:
            return decide(
                StepEnd([], self.spec.ranks, machine.hosts),
                self._situation(situation, machine),
                limits,
            )
        end = self._task(logs) if self.spec.kind == "task" else self._ranks(machine, logs)
        return decide(end, self._situation(situation, machine), limits)

    def _machine(self, spec: JobSpec) -> Machine:
        return ThisMachine(spec) if self.local else SlurmNodes(spec)

    def _ranks(self, machine: Machine, logs: Path) -> StepEnd:
        lines = this_launch(events.read(self.state))
        first = [] if any(line["event"] == "step" for line in lines) else self.spec.first
        return self._run(
            machine,
            [self.spec.python, self.spec.code, *self.spec.command, *first],
            self.spec.ranks,
            logs,
        )

    def _run(self, machine: Machine, command: list[str], ranks: int, logs: Path) -> StepEnd:
        limits, environment = self.spec.restarts, self._environment()
        return run_ranks(
            machine,
            command,
            ranks,
            logs,
            environment,
            self.asked,
            limits,
            self._end_time,
            self._on_sigterm,
        )

    def _task(self, logs: Path) -> StepEnd:
        """A command of a single process, of a job array or after a run."""
        words = [word.replace("{task}", str(self.task or 0)) for word in self.spec.command]
        return self._run(OneProcess(self.spec), [self.spec.python, self.spec.code, *words], 1, logs)

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(
            part for part in (self.spec.code, os.environ.get("PYTHONPATH", "")) if part
        )
        return {
            **self.spec.environment,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "LLADA_ATTEMPT": str(self.attempt),
        }

    def _preflight(self, logs: Path, now: Situation) -> Decision | None:
        """Test the nodes; None: all is well."""
        # Where the user started it may be a checkout, whose packages -m would take for those of the
        # snapshot.
        machine = self._machine(replace(self.spec, directory=self.spec.code, quiet=False))
        rules = self.spec.preflight
        assert rules is not None
        folder = logs / "preflight"
        folder.mkdir()
        command = [self.spec.python, "-m", "launch.preflight.main", str(folder), str(self.state)]
        rules = {**rules, "join_seconds": self.spec.restarts.start_timeout}
        environment = {**self._environment(), "LLADA_PREFLIGHT": to_environment(rules)}
        limits = jobs.Restarts(
            start_timeout=self.spec.restarts.start_timeout, grace=rules["seconds"]
        )
        started = time.time()
        end = run_ranks(
            machine,
            command,
            self.spec.ranks,
            folder,
            environment,
            self.asked,
            limits,
            self._end_time,
        )
        verdict = judge(folder, machine.hosts, self.spec.tasks_per_node, rules, end)
        self._write(
            "preflight",
            seconds=round(time.time() - started, 1),
            bad=verdict.bad or None,
            nodes=verdict.measured,
        )
        for line in verdict.lines:
            print(f"llada: preflight: {line}", flush=True)
        if self.asked or (not verdict.bad and verdict.problem is None):
            return None
        if verdict.problem is not None:
            return restart(f"preflight: {verdict.problem}", [], now, self.spec.restarts)
        reason = "preflight: " + "; ".join(f"{host}: {why}" for host, why in verdict.bad.items())
        if len(machine.hosts) > 1 and len(verdict.bad) * 2 > len(machine.hosts):
            # Most nodes alike are no accident of one: it may be that the profile asks for what the
            # machines do not have.
            return restart(
                f"{reason}; that is most of the nodes, so none is excluded",
                [],
                now,
                self.spec.restarts,
            )
        return restart(reason, list(verdict.bad), now, self.spec.restarts)

    # -- what Slurm and the user say ---------------------------------------------------------------

    def _signal(self) -> str | None:
        return self.stop.signal

    def _own_events(self) -> list[dict[str, Any]]:
        return [
            line
            for line in events.read(self.state)
            if line.get("attempt") == self.attempt and line.get("task") == self.task
        ]

    def _ends_at(self) -> float:
        """Seconds since 1970 at which the ranks have to be gone, so that this process can still put
        the job back into the queue.
        """
        if self.local or self.job is None:
            return float("inf")
        shown = slurm.describe(self.job)
        left = _seconds(shown.get("TimeLimit")) - _seconds(shown.get("RunTime"))
        return time.time() + left - self.spec.restarts.reserve if left > 0 else float("inf")

    def _on_sigterm(self) -> None:
        """scancel is final: the rest of a chain goes before anything is waited for, since Slurm
        soon ends this process, too.
        """
        if self.spec.chain > 1 and self._job_state() == "cancelled":
            machine = self._machine(self.spec)
            if not slurm.unreachable(machine.hosts):
                self._end_chain(Decision("cancelled", "cancelled with scancel, which is final"))

    def _signal_of_ranks(self) -> str | None:
        """The signal at which the ranks agreed to stop: before a preemption, Slurm may tell them
        alone.
        """
        own = [line for line in self._own_events() if line["event"] == "signal"]
        return own[-1].get("signal") or "a signal" if own else None

    def _situation(self, start: Situation, machine: Machine) -> Situation:
        signal = self._signal() or self._signal_of_ranks()
        state = self._job_state()  # first: a job that is being ended has half a minute
        gone: list[str] = []
        if not self.local:
            with suppress(RunError):
                gone = slurm.unreachable(machine.hosts)
        if state == "cancelled" and gone:
            state = "lost"  # Slurm shows both as COMPLETING
        return Situation(
            signal=signal,
            # Read now: the ranks may have stopped because the user asked for it a moment ago.
            wanted=self.asked.wanted_now or (self.local and self._signal() is not None),
            state=state,
            progress=any(line["event"] == "checkpoint" for line in self._own_events()),
            failures=start.failures,
            last=start.last,
            unreachable=gone,
        )

    def _job_state(self) -> JobState:
        """What Slurm is doing with this job. A job that is being ended shows as COMPLETING,
        whatever becomes of it.
        """
        if self.local or self.job is None:
            return "running"
        shown = slurm.describe(self.job, patience=slurm.PATIENCE)
        state = shown.get("JobState", "")
        if not state:
            return "unknown"
        if state == "RUNNING":
            return "running"
        if int(shown.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            return "requeued"
        if state == "TIMEOUT" or (
            state == "COMPLETING"
            and _seconds(shown.get("RunTime")) >= _seconds(shown.get("TimeLimit")) > 0
        ):
            return "running"  # over its time, not cancelled: it may be put back into the queue
        return "cancelled"

    # -- the next start ----------------------------------------------------------------------------

    def _again(self, decision: Decision) -> int:
        """Put this job back into the queue. Slurm then ends this process."""
        assert self.job is not None
        if self.asked.wanted_now:
            self._write("stopped", reason="as asked, before the next start")
            return decision.code
        if not self.spec.restarts.requeue:
            return self._leave_to_chain(decision)
        self.stop.signal = None
        refused = slurm.requeue(self.job)
        if refused is not None:
            reason = (
                f"Slurm does not put the job back into the queue ({refused}); submit the run again,"
                " or use --chain"
            )
            self._write("failed", reason=reason, failure=True)
            print(f"llada: failed: {reason}", flush=True)
            return 1
        self._wish(self.job, decision)
        # until Slurm ends this process, so that the job's end is the requeue and no exit code
        self._sleep(30)
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
            reason = (
                f"{decision.reason}; no job is left to go on (requeue.enabled is false): submit the"
                " run again"
            )
            self._write(
                "failed" if decision.failure else "stopped",
                reason=reason,
                failure=decision.failure or None,
            )
        return decision.code

    def _wish(self, job: str, decision: Decision) -> None:
        """Tell Slurm when and where a job may start."""
        wishes = []
        if decision.delay:
            wishes.append(f"StartTime=now+{int(decision.delay)}")
        if decision.exclude:
            wishes.append(
                "ExcNodeList=" + ",".join([*self.spec.exclude, *self._excluded(decision)])
            )
        for wish in wishes:  # one by one: a refusal of one must not take the other with it
            refused = slurm.update(job, wish)
            if refused is not None:
                print(f"llada: Slurm refused {wish} of job {job}: {refused}", flush=True)

    def _excluded(self, decision: Decision) -> list[str]:
        """Nodes to avoid, the latest last: those of the last day, and no more than the partition
        can spare.
        """
        since = time.time() - _EXCLUDED_SECONDS
        lines = [line for line in this_launch(events.read(self.state)) if line["time"] > since]
        found = [host for line in lines for host in line.get("excluded", [])] + decision.exclude
        latest = list(dict.fromkeys(reversed(found)))[::-1]
        nodes = slurm.nodes_of_partition(slurm.describe(str(self.job)).get("Partition", ""))
        if not nodes:  # Slurm does not say
            return latest
        spare = nodes - self.spec.nodes - len(self.spec.exclude)
        return latest[-spare:] if spare > 0 else []

    def _end_chain(self, decision: Decision) -> None:
        """The jobs that would go on have nothing to do; the conversion waits for the one that
        finished.
        """
        sent = jobs.submitted(self.folder)
        if self.local or self.spec.kind != "train" or sent is None or len(sent.jobs) < 2:
            return
        with suppress(RunError):
            if sent.then is not None and decision.event == "finished":
                slurm.update(sent.then, f"Dependency=afterok:{self.job}")
            slurm.cancel(*(other for other in sent.jobs if other != self.job))

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._signal() and not (self.local and self.asked):
            time.sleep(0.2)

    def _write(self, event: str, **fields: Any) -> None:
        """Write an event. That a file server is away for a while must not end the run, which can do
        without the line.
        """
        for pause in (1.0, 5.0, 15.0, 0.0):
            try:
                self.log.write(event, attempt=self.attempt, job=self.job, task=self.task, **fields)
                return
            except OSError as error:
                problem = error
                time.sleep(pause)
        with suppress(OSError):
            print(f"llada: the event {event} was not written ({problem})", flush=True)


def _seconds(text: str | None) -> float:
    """Seconds of Slurm's D-HH:MM:SS; 0 for what is none (UNLIMITED)."""
    days, _, clock = (text or "").rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        return int(days or 0) * 86400 + sum(
            part * 60**power for power, part in enumerate(reversed(parts))
        )
    except ValueError:
        return 0.0

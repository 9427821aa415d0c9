"""The batch script of a job, in Python.

It starts the ranks, forwards signals, writes events and starts the job again. `launch.job.main`
runs it. Standard library only.
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
from launch.job.attempt import StopState, run_ranks
from launch.job.bad_nodes import Rules, judge
from launch.job.failure import Failure
from launch.job.machines import Machine, OneProcess, RankCommand, SlurmNodes, ThisMachine
from launch.job.own_job import (
    configure_start,
    count_nodes_of_partition,
    job_state,
    latest_nodes,
    seconds_left,
)
from launch.job.policy import (
    Decision,
    Situation,
    decide,
    failures_in_a_row,
    restart,
)
from launch.job.records import AttemptEnd
from launch.job.spec import (
    STOP_FILE,
    JobSpec,
    Restarts,
    latest_checkpoint,
    make_numbered_folder,
    read_submitted,
)
from llada import events
from llada.errors import RunError
from llada.events import EventLog, since_submission
from llada.training.signals import StopRequest

_EXCLUDED_SECONDS = 86400.0
"""A bad node is avoided for a day; until then somebody may have repaired it."""
_NEVER = float("inf")


class Supervisor:
    """Runs one launch of a run: one attempt in a Slurm job, as many as it takes on this machine.

    Args:
        launch_folder: RUN/launch/NNNN.
        stop: true when this process is asked to stop.
        local: on this machine instead of in a Slurm job.
    """

    def __init__(self, launch_folder: Path, stop: StopRequest, local: bool) -> None:
        self.launch_folder = launch_folder
        self.stop = stop
        self.local = local
        self.spec = JobSpec.read(launch_folder)
        self.state = Path(self.spec.state)
        self.task: int | None = None
        if self.spec.array and "SLURM_ARRAY_TASK_ID" in os.environ:
            self.task = int(os.environ["SLURM_ARRAY_TASK_ID"])
        self.job: str | None = None
        if not local:
            self.job = slurm.own_job_id(self.spec.array)
        self.stop_state = StopState(stop, launch_folder / STOP_FILE)
        self.log = EventLog(self.state)
        self.attempt = 0
        self._end_by = _NEVER

    def run(self) -> int:
        """Run attempts until the run ends or the job is requeued; returns the job's exit code."""
        while True:
            decision = self._guarded_attempt()
            self._report(decision)
            if decision.event != "requeued":
                self._end_chain(decision)
                return decision.code
            if decision.by_slurm:
                return decision.code
            if not self.local:
                return self._requeue(decision)
            self._sleep(decision.delay)
            if self.stop or self.stop_state.by_user_now():
                self._log_event("stopped", reason="as requested, before the next start")
                return decision.code

    def _report(self, decision: Decision) -> None:
        fields: dict[str, Any] = {
            "reason": decision.reason or None,
            "failure": decision.failure or None,
            "failure_kind": decision.kind,
            "excluded": decision.exclude or None,
            "delay": decision.delay or None,
        }
        if self.spec.kind == "train":
            fields["step"] = latest_checkpoint(self.state)
        if self.local:
            # `llada status` looks for this process between two attempts.
            fields["host"] = socket.gethostname()
            fields["pid"] = os.getpid()
        self._log_event(decision.event, **fields)
        line = f"llada: {decision.event}"
        if decision.reason:
            line = f"{line}: {decision.reason}"
        print(line, flush=True)

    # -- one attempt -------------------------------------------------------------------------------

    def _guarded_attempt(self) -> Decision:
        """Run an attempt in which an error of this process counts as a failure like a rank's.

        The error may be temporary, as a file server that is away: the run must not end for it.
        """
        try:
            return self._attempt()
        except Exception as error:
            traceback.print_exc()
            reason = f"supervisor: {type(error).__name__}: {error}"
            situation = self._situation_at_start()
            return restart(Failure("supervisor", reason), [], situation, self.spec.restarts)

    def _attempt(self) -> Decision:
        parent = self.state / "logs"
        if self.task is not None:
            parent = parent / f"task-{self.task:05d}"
        self.attempt, logs = make_numbered_folder(parent, "attempt-{:04d}")
        situation = self._situation_at_start()
        machine = self._machine(self.spec)
        self._log_event(
            "started",
            nodes=machine.hosts,
            ranks=self.spec.ranks,
            host=socket.gethostname(),
            logs=str(logs),
            pid=os.getpid(),
        )
        limits = self.spec.restarts
        if situation.failures > limits.limit:
            # The attempts before ended without a record, so none of them could end the run.
            return restart(Failure("vanished", situation.last_reason or ""), [], situation, limits)
        self._end_by = self._end_of_job()
        if self.spec.kind == "train" and self.spec.preflight is not None and not self.stop_state:
            refusal = self._preflight(self.spec.preflight, logs, situation)
            if refusal is not None:
                return refusal
        if self.stop_state:
            end = AttemptEnd([], self.spec.ranks, machine.hosts)
        elif self.spec.kind == "task":
            end = self._run_task(logs)
        else:
            end = self._run_training(machine, logs)
        return decide(end, self._situation(situation, machine), limits)

    def _machine(self, spec: JobSpec) -> Machine:
        if self.local:
            return ThisMachine(spec)
        return SlurmNodes(spec)

    def _run_training(self, machine: Machine, logs: Path) -> AttemptEnd:
        words = [self.spec.python, self.spec.code, *self.spec.command]
        lines = since_submission(events.read(self.state))
        if not any(line["event"] == "step" for line in lines):
            words += self.spec.first
        return self._run(machine, words, self.spec.ranks, logs)

    def _run_task(self, logs: Path) -> AttemptEnd:
        """Run the command of a single process: a task of a job array, or the conversion."""
        arguments = [word.replace("{task}", str(self.task or 0)) for word in self.spec.command]
        words = [self.spec.python, self.spec.code, *arguments]
        return self._run(OneProcess(self.spec), words, 1, logs)

    def _run(self, machine: Machine, words: list[str], ranks: int, logs: Path) -> AttemptEnd:
        return run_ranks(
            machine,
            RankCommand(words, ranks, logs, self._environment()),
            self.stop_state,
            self.spec.restarts,
            self._end_by,
            self._on_sigterm,
        )

    def _environment(self) -> dict[str, str]:
        """Variables of every rank."""
        # The snapshot of the code comes before what the user's own PYTHONPATH names.
        path = self.spec.code
        if os.environ.get("PYTHONPATH"):
            path = os.pathsep.join([path, os.environ["PYTHONPATH"]])
        return {
            **self.spec.environment,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "LLADA_ATTEMPT": str(self.attempt),
        }

    # -- the tests of the nodes --------------------------------------------------------------------

    def _preflight(
        self, settings: dict[str, float], logs: Path, situation: Situation
    ) -> Decision | None:
        """Test the nodes; returns None when all is well."""
        limits = self.spec.restarts
        # The folder where the user started the run may be a checkout, whose packages `python -m`
        # would prefer to those of the snapshot. The tests handle no signals.
        machine = self._machine(replace(self.spec, directory=self.spec.code, quiet=False))
        rules = Rules.of_settings(settings, join_seconds=limits.start_timeout)
        folder = logs / "preflight"
        folder.mkdir()
        command = RankCommand(
            [self.spec.python, "-m", "launch.preflight.main", str(folder), str(self.state)],
            self.spec.ranks,
            folder,
            {**self._environment(), "LLADA_PREFLIGHT": rules.to_json()},
        )
        started = time.time()
        end = run_ranks(
            machine,
            command,
            self.stop_state,
            Restarts(start_timeout=limits.start_timeout, grace=rules.seconds),
            self._end_by,
        )
        verdict = judge(folder, machine.hosts, self.spec.tasks_per_node, rules, end)
        self._log_event(
            "preflight",
            seconds=round(time.time() - started, 1),
            bad=verdict.bad or None,
            nodes=verdict.measured,
        )
        for line in verdict.lines:
            print(f"llada: preflight: {line}", flush=True)

        if self.stop_state or (not verdict.bad and verdict.problem is None):
            return None
        exclude: list[str] = []
        if verdict.problem is not None:
            reason = verdict.problem
        else:
            reason = "; ".join(f"{host}: {why}" for host, why in verdict.bad.items())
            if len(machine.hosts) > 1 and len(verdict.bad) * 2 > len(machine.hosts):
                # Most nodes alike are no accident of one: the profile may ask for what the machines
                # do not have.
                reason = f"{reason}; that is most of the nodes, so none is excluded"
            else:
                exclude = list(verdict.bad)
        return restart(Failure("preflight", f"preflight: {reason}"), exclude, situation, limits)

    # -- what Slurm and the user want --------------------------------------------------------------

    def _situation_at_start(self) -> Situation:
        failures, last_reason = failures_in_a_row(events.read(self.state), self.attempt, self.task)
        return Situation(
            failures=failures,
            last_reason=last_reason,
            stopped_by_user=self.stop_state.by_user_now(),
        )

    def _situation(self, start: Situation, machine: Machine) -> Situation:
        """The situation at the end of the ranks."""
        signal = self.stop.signal or self._signal_of_ranks()
        # Slurm is asked first: a job that is being ended has half a minute.
        state = job_state(self.job)
        unreachable: list[str] = []
        if not self.local:
            with suppress(RunError):
                unreachable = slurm.unreachable_nodes(machine.hosts)
        if state == "cancelled" and unreachable:
            # Slurm shows both as COMPLETING.
            state = "lost"
        # Ctrl-C of a run on this machine is the user's, too.
        interrupted = self.local and self.stop.signal is not None
        return Situation(
            signal=signal,
            # Read now: the ranks may have stopped because the user asked for it a moment ago.
            stopped_by_user=self.stop_state.by_user_now() or interrupted,
            state=state,
            progress=any(line["event"] == "checkpoint" for line in self._own_events()),
            failures=start.failures,
            last_reason=start.last_reason,
            unreachable=unreachable,
        )

    def _signal_of_ranks(self) -> str | None:
        """The signal at which the ranks agreed to stop.

        Before a preemption, Slurm may send it to the ranks alone.
        """
        for line in reversed(self._own_events()):
            if line["event"] == "signal":
                return line.get("signal") or "a signal"
        return None

    def _own_events(self) -> list[dict[str, Any]]:
        """The events of this attempt, in the order they were written."""
        return [
            line
            for line in events.read(self.state)
            if line.get("attempt") == self.attempt and line.get("task") == self.task
        ]

    def _end_of_job(self) -> float:
        """Return when the ranks have to be gone, seconds since 1970.

        After that, this process still has the time to put the job back into the queue.
        """
        if self.local or self.job is None:
            return _NEVER
        left = seconds_left(self.job)
        if left is None:
            return _NEVER
        return time.time() + left - self.spec.restarts.reserve

    def _on_sigterm(self) -> None:
        """Cancel the rest of a chain when the job is cancelled: scancel is final.

        This comes before anything is waited for, since Slurm soon ends this process, too.
        """
        if self.spec.chain > 1 and job_state(self.job) == "cancelled":
            machine = self._machine(self.spec)
            if not slurm.unreachable_nodes(machine.hosts):
                self._end_chain(Decision("cancelled", "cancelled with scancel, which is final"))

    # -- the next start ----------------------------------------------------------------------------

    def _requeue(self, decision: Decision) -> int:
        """Put this job back into the queue. Slurm then ends this process."""
        assert self.job is not None
        if self.stop_state.by_user_now():
            self._log_event("stopped", reason="as requested, before the next start")
            return decision.code
        if not self.spec.restarts.requeue:
            return self._leave_to_chain(decision)
        # From here on, a signal is Slurm's, for the requeue.
        self.stop.signal = None
        refusal = slurm.requeue(self.job)
        if refusal is not None:
            reason = (
                f"Slurm does not put the job back into the queue ({refusal}); submit the run again,"
                " or use --chain"
            )
            self._log_event("failed", reason=reason, failure=True)
            print(f"llada: failed: {reason}", flush=True)
            return 1
        self._configure_next_starts([self.job], decision)
        # Slurm ends this process, so that the job's end is the requeue and not an exit code.
        self._sleep(30)
        return decision.code

    def _leave_to_chain(self, decision: Decision) -> int:
        """Let the next job of the chain continue; without one, the run ends."""
        submitted = read_submitted(self.launch_folder)
        later: list[str] = []
        if submitted is not None and self.job in submitted.jobs:
            later = submitted.jobs[submitted.jobs.index(self.job) + 1 :]
        if later:
            # Excluded nodes hold for all jobs that are left, the back-off for the next alone.
            affected = later if decision.exclude else later[:1]
            self._configure_next_starts(affected, decision)
            print(f"llada: job {later[0]} continues", flush=True)
            return decision.code
        reason = (
            f"{decision.reason}; no job is left to continue (requeue.enabled is false): submit the"
            " run again"
        )
        self._log_event(
            "failed" if decision.failure else "stopped",
            reason=reason,
            failure=decision.failure or None,
            failure_kind=decision.kind,
        )
        return decision.code

    def _configure_next_starts(self, jobs: list[str], decision: Decision) -> None:
        """Tell Slurm when and where the next jobs may start."""
        exclude = None
        if decision.exclude:
            exclude = [*self.spec.exclude, *self._nodes_to_exclude(decision)]
        for job in jobs:
            configure_start(job, decision.delay, exclude)

    def _nodes_to_exclude(self, decision: Decision) -> list[str]:
        """Return the bad nodes of the last day, no more than the partition can spare."""
        since = time.time() - _EXCLUDED_SECONDS
        bad: list[str] = []
        for line in since_submission(events.read(self.state)):
            if line["time"] > since:
                bad += line.get("excluded", [])
        bad += decision.exclude
        nodes = count_nodes_of_partition(str(self.job))
        # Where Slurm does not say how many there are, all bad ones are avoided.
        spare = None
        if nodes:
            spare = nodes - self.spec.nodes - len(self.spec.exclude)
        return latest_nodes(bad, spare)

    def _end_chain(self, decision: Decision) -> None:
        """Cancel the other jobs of a chain; the conversion then waits for the one that finished."""
        submitted = read_submitted(self.launch_folder)
        if self.local or self.spec.kind != "train" or submitted is None:
            return
        if len(submitted.jobs) < 2:
            return
        with suppress(RunError):
            if submitted.then is not None and decision.event == "finished":
                slurm.update(submitted.then, f"Dependency=afterok:{self.job}")
            slurm.cancel(*(job for job in submitted.jobs if job != self.job))

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stopped = self.stop.signal is not None or (self.local and bool(self.stop_state))
            if stopped:
                return
            time.sleep(0.2)

    def _log_event(self, event: str, **fields: Any) -> None:
        """Write an event.

        The run can do without the line, so a file server that is away for a while must not end it.
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

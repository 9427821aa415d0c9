"""The supervisor of a job: what the batch script runs on the first node.

It starts the ranks, forwards signals, writes events and requeues the job. Standard library only.
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
from launch.job.bad_nodes import Verdict, judge
from launch.job.failure import Failure
from launch.job.findings import Rules
from launch.job.machines import Machine, OneProcess, RankCommand, SlurmNodes, ThisMachine
from launch.job.next_start import NextStart
from launch.job.own_job import job_state, seconds_left
from launch.job.policy import (
    Decision,
    Situation,
    decide,
    explain_verdict,
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
)
from llada import events, exits
from llada.errors import RunError
from llada.events import EventLog, since_submission
from llada.training.signals import StopRequest

_REQUEUE_SECONDS = 30.0
"""Seconds that Slurm has to end this process after a requeue."""
_EVENT_PAUSES = (0.0, 1.0, 5.0, 15.0)
"""Seconds before each try to write an event."""
_NEVER = float("inf")


class Supervisor:
    """Runs a launch: a single attempt in a Slurm job, as many as it takes on this machine.

    Args:
        launch_folder: RUN/launch/NNNN.
        stop: stop signals of this process.
        local: whether the run is on this machine instead of in a Slurm job.
    """

    def __init__(self, launch_folder: Path, stop: StopRequest, local: bool) -> None:
        self.launch_folder = launch_folder
        self.stop = stop
        self.local = local
        self.spec = JobSpec.read(launch_folder)
        self.run_folder = Path(self.spec.run_folder)
        self.task: int | None = None
        if self.spec.array and "SLURM_ARRAY_TASK_ID" in os.environ:
            self.task = int(os.environ["SLURM_ARRAY_TASK_ID"])
        self.job: str | None = None
        if not local:
            self.job = slurm.own_job_id(self.spec.array)
        self.stop_state = StopState(stop, launch_folder / STOP_FILE)
        self.log = EventLog(self.run_folder)
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
            if self.stop or self.stop_state.requested_by_user(fresh=True):
                self._log_stop()
                return decision.code

    def _report(self, decision: Decision) -> None:
        """Write how the attempt ended to the events and to the console."""
        fields: dict[str, Any] = {
            "reason": decision.reason or None,
            "failure": decision.failure or None,
            "failure_kind": decision.kind,
            "failure_key": decision.key,
            "excluded": decision.exclude or None,
            "delay": decision.delay or None,
        }
        if self.spec.kind == "train":
            fields["step"] = latest_checkpoint(self.run_folder)
        if self.local:
            # Between two attempts, `llada status` looks for this process.
            fields["host"] = socket.gethostname()
            fields["pid"] = os.getpid()
        self._log_event(decision.event, **fields)
        line = f"llada: {decision.event}"
        if decision.reason:
            line = f"{line}: {decision.reason}"
        print(line, flush=True)

    # -- one attempt -------------------------------------------------------------------------------

    def _guarded_attempt(self) -> Decision:
        """Run an attempt; an error of this process counts as a failure, like that of a rank.

        The error may be temporary, for example a file server that does not answer. It must not end
        the run.
        """
        try:
            return self._attempt()
        except Exception as error:
            traceback.print_exc()
            reason = f"supervisor: {type(error).__name__}: {error}"
            situation = self._situation_at_start()
            return restart(Failure("supervisor", reason), [], situation, self.spec.restarts)

    def _attempt(self) -> Decision:
        parent = self.run_folder / "logs"
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
            # Earlier attempts died without a record, so none of them could end the run.
            return restart(Failure("vanished", situation.last_reason or ""), [], situation, limits)
        self._end_by = self._end_of_job()
        has_preflight = self.spec.kind == "train" and self.spec.preflight is not None
        if has_preflight and not self.stop_state.requested():
            refusal = self._preflight(logs, situation)
            if refusal is not None:
                return refusal
        if self.stop_state.requested():
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
        lines = since_submission(events.read(self.run_folder))
        has_taken_a_step = any(line["event"] == "step" for line in lines)
        if not has_taken_a_step:
            words += self.spec.first_start_arguments
        return self._run(machine, words, self.spec.ranks, logs)

    def _run_task(self, logs: Path) -> AttemptEnd:
        """Run a command of a single process: a task of a job array, or a conversion."""
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
        """Environment variables of every rank."""
        # The snapshot of the code comes before the user's own PYTHONPATH.
        path = self.spec.code
        if os.environ.get("PYTHONPATH"):
            path = os.pathsep.join([path, os.environ["PYTHONPATH"]])
        return {
            **self.spec.environment,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "LLADA_ATTEMPT": str(self.attempt),
        }

    # -- node tests --------------------------------------------------------------------------------

    def _preflight(self, logs: Path, situation: Situation) -> Decision | None:
        """Test the nodes; returns None if the run can start on them."""
        verdict, hosts = self._test_nodes(logs)
        explained = explain_verdict(verdict, hosts)
        if explained is None or self.stop_state.requested():
            return None
        failure, exclude = explained
        return restart(failure, exclude, situation, self.spec.restarts)

    def _test_nodes(self, logs: Path) -> tuple[Verdict, list[str]]:
        """Run the tests on every rank; returns what is wrong with the nodes, and the nodes."""
        assert self.spec.preflight is not None
        start_timeout = self.spec.restarts.start_timeout
        test_spec = replace(
            self.spec,
            # The folder where the user launched the run may be a checkout of the code, and
            # `python -m` would prefer its packages to those of the snapshot.
            directory=self.spec.code,
            # The tests have no signal handlers.
            ignore_early_signals=False,
        )
        machine = self._machine(test_spec)
        rules = Rules.of_settings(self.spec.preflight, join_seconds=start_timeout)
        folder = logs / "preflight"
        folder.mkdir()
        command = RankCommand(
            [self.spec.python, "-m", "launch.preflight.main", str(folder), str(self.run_folder)],
            self.spec.ranks,
            folder,
            {**self._environment(), "LLADA_PREFLIGHT": rules.to_json()},
        )
        started = time.time()
        end = run_ranks(
            machine,
            command,
            self.stop_state,
            Restarts(start_timeout=start_timeout, grace=rules.seconds),
            self._end_by,
        )
        verdict = judge(folder, machine.hosts, self.spec.tasks_per_node, rules, end)
        self._log_event(
            "preflight",
            seconds=round(time.time() - started, 1),
            bad={host: fault.why for host, fault in verdict.bad.items()} or None,
            nodes=verdict.measured,
        )
        for line in verdict.lines:
            print(f"llada: preflight: {line}", flush=True)
        return verdict, machine.hosts

    # -- what Slurm and the user ask for -----------------------------------------------------------

    def _situation_at_start(self) -> Situation:
        lines = events.read(self.run_folder)
        failed = failures_in_a_row(lines, self.attempt, self.task)
        return Situation(
            failures=failed.count,
            last_reason=failed.last_reason,
            last_key=failed.last_key,
            stopped_by_user=self.stop_state.requested_by_user(fresh=True),
        )

    def _situation(self, start: Situation, machine: Machine) -> Situation:
        """The situation after the ranks have ended."""
        signal = self.stop.signal or self._signal_of_ranks()
        # Ask Slurm first: half a minute after it begins to end a job, it kills this process.
        state = job_state(self.job)
        unreachable: list[str] = []
        if not self.local:
            with suppress(RunError):
                unreachable = slurm.unreachable_nodes(machine.hosts)
        if state == "cancelled" and unreachable:
            # Slurm shows COMPLETING for a cancelled job and for one that has lost a node.
            state = "lost"
        # On this machine, a signal is the user's Ctrl-C.
        interrupted = self.local and self.stop.signal is not None
        # The ranks may have stopped because the user asked for it a moment ago.
        requested = self.stop_state.requested_by_user(fresh=True)
        left_checkpoint = any(line["event"] == "checkpoint" for line in self._own_events())
        return Situation(
            signal=signal,
            stopped_by_user=requested or interrupted,
            state=state,
            progress=left_checkpoint,
            failures=start.failures,
            last_reason=start.last_reason,
            last_key=start.last_key,
            unreachable=unreachable,
        )

    def _signal_of_ranks(self) -> str | None:
        """The signal at which the ranks agreed to stop; None: they did not.

        Before a preemption, Slurm may signal the ranks and not this process.
        """
        for line in reversed(self._own_events()):
            if line["event"] == "signal":
                return line.get("signal") or "a signal"
        return None

    def _own_events(self) -> list[dict[str, Any]]:
        """The events of this attempt, oldest first."""
        return [
            line
            for line in events.read(self.run_folder)
            if line.get("attempt") == self.attempt and line.get("task") == self.task
        ]

    def _end_of_job(self) -> float:
        """Return the time at which the ranks are killed, seconds since 1970.

        It leaves this process enough time to requeue the job.
        """
        if self.local or self.job is None:
            return _NEVER
        left = seconds_left(self.job)
        if left is None:
            return _NEVER
        return time.time() + left - self.spec.restarts.reserve

    def _on_sigterm(self) -> None:
        """Cancel the rest of a chain if this job was cancelled: scancel is final.

        Called as soon as SIGTERM arrives, because Slurm soon ends this process too.
        """
        if self.spec.chain > 1 and job_state(self.job) == "cancelled":
            machine = self._machine(self.spec)
            if not slurm.unreachable_nodes(machine.hosts):
                self._end_chain(Decision("cancelled", "cancelled with scancel, which is final"))

    # -- the next start ----------------------------------------------------------------------------

    def _requeue(self, decision: Decision) -> int:
        """Requeue this job or leave the run to the next one; returns this job's exit code."""
        assert self.job is not None
        if self.stop_state.requested_by_user(fresh=True):
            self._log_stop()
            return decision.code
        next_start = NextStart(self.job, self.spec, self.launch_folder)
        if not self.spec.restarts.requeue:
            return self._leave_to_chain(next_start, decision)
        # Slurm signals this process when it requeues the job. Earlier signals have been dealt with.
        self.stop.signal = None
        refusal = next_start.requeue(decision)
        if refusal is not None:
            reason = (
                f"Slurm does not put the job back into the queue ({refusal}); submit the run again,"
                " or use --chain"
            )
            kind = decision.kind or "supervisor"
            self._log_event("failed", reason=reason, failure=True, failure_kind=kind)
            print(f"llada: failed: {reason}", flush=True)
            return exits.FAILED
        # Slurm ends this process, so that the job ends with the requeue, not with an exit code.
        self._sleep(_REQUEUE_SECONDS)
        return decision.code

    def _leave_to_chain(self, next_start: NextStart, decision: Decision) -> int:
        """Let the next job of the chain continue; if there is none, the run ends."""
        next_job = next_start.leave_to_chain(decision)
        if next_job is not None:
            print(f"llada: job {next_job} continues", flush=True)
            return decision.code
        event = "stopped"
        if decision.failure:
            event = "failed"
        reason = (
            f"{decision.reason}; no job is left to continue (requeue.enabled is false): submit the"
            " run again"
        )
        self._log_event(
            event,
            reason=reason,
            failure=decision.failure or None,
            failure_kind=decision.kind,
        )
        return decision.code

    def _end_chain(self, decision: Decision) -> None:
        """Cancel the other jobs of the chain, if there are any."""
        if self.job is not None:
            next_start = NextStart(self.job, self.spec, self.launch_folder)
            next_start.end_chain(finished=decision.event == "finished")

    # -- waiting and events ------------------------------------------------------------------------

    def _sleep(self, seconds: float) -> None:
        """Wait; a signal ends the wait, and on this machine `llada stop` does too."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.stop or (self.local and self.stop_state.requested()):
                return
            time.sleep(0.2)

    def _log_stop(self) -> None:
        self._log_event("stopped", reason="as requested, before the next start")

    def _log_event(self, event: str, **fields: Any) -> None:
        """Write an event.

        A file server that does not answer for a while must not end the run, which can do without
        the event.
        """
        problem: OSError | None = None
        for pause in _EVENT_PAUSES:
            time.sleep(pause)
            try:
                self.log.write(event, attempt=self.attempt, job=self.job, task=self.task, **fields)
                return
            except OSError as error:
                problem = error
        with suppress(OSError):
            print(f"llada: the event {event} was not written ({problem})", flush=True)

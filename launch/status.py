"""`llada status`: the state of a run, from its files, its events and Slurm."""

from __future__ import annotations

import json
import os
import statistics
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from launch import slurm
from launch.job.spec import Submitted, latest_checkpoint, launch_folders, read_submitted
from launch.slurm import Job
from llada import events
from llada.errors import UserError
from llada.events import RUN_END_EVENTS, Event
from llada.training import lock
from llada.training.reporting import metrics

_METRICS_TAIL_BYTES = 1 << 18
_RECENT_STEPS = 20
"""Number of steps whose median time gives the speed."""
_SHOWN_JOBS = 8
_STATE_EVENTS = ("submitted", "started", "requeued", *RUN_END_EVENTS)
"""Names of the events that change the state of a run."""
_FAILED_JOB_STATES = (
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
)
_REASONS = {
    "Resources": "waits for nodes to become free",
    "Priority": "other jobs come first",
    "BeginTime": "waits for its start time (after a failure: the back-off)",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "waits for a job that can no longer succeed; cancel this one",
    "PartitionTimeLimit": (
        "requests more time than the partition allows, so it will never start; lower `time` in the"
        " profile"
    ),
    "PartitionNodeLimit": (
        "requests more nodes than the partition allows or has, so it will never start; fewer"
        " --nodes"
    ),
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "BadConstraints": (
        "no node is left that fits (constraints, excluded nodes), so it will never start"
    ),
    "ReqNodeNotAvail": "a node it needs is down, drained or reserved",
    "Reservation": "waits for its reservation to begin",
    "JobHeldUser": "is held; release it with `scontrol release`",
    "JobHeldAdmin": "is held by an administrator",
    "launch failed requeued held": (
        "could not be started and is held; release it with `scontrol release`"
    ),
    "Cleaning": "its earlier attempt is being cleaned up",
    "Licenses": "waits for a license",
}
"""Meaning of Slurm's reasons for a pending job."""


@dataclass(frozen=True)
class RunStatus:
    """The state of a run. The fields are the keys of `llada status --json`; None: not known.

    Attributes:
        run: folder of the run.
        task: pretrain, sft, or data for a data preparation.
        state: RUNNING, COMPLETING, PENDING or another state of a waiting job; FINISHED, STOPPED,
            CANCELLED or FAILED; LOST: it ended without a record; IDLE: it is not running, and
            nothing says that it ended.
        reason: why it is pending, or why it ended.
        jobs: jobs of the latest launch, each "ID STATE".
        nodes: nodes it runs on, in Slurm's short form.
        step: number of finished steps.
        steps: number of all steps.
        loss: loss of the last step.
        tokens_per_second: speed of the last step.
        eta_seconds: time until the run finishes, at the speed of the last steps, seconds.
        checkpoint: step of the latest complete checkpoint; 0: no checkpoint.
        attempt: number of the latest attempt of the latest launch.
        restarts: number of restarts of the latest launch.
        last_error: reason of the latest failure of the latest launch.
        then: job that waits for the run to finish, "ID STATE: REASON".
    """

    run: str
    task: str | None = None
    state: str = "IDLE"
    reason: str | None = None
    jobs: list[str] | None = None
    nodes: str | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | str | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    checkpoint: int | None = None
    attempt: int | None = None
    restarts: int | None = None
    last_error: str | None = None
    then: str | None = None

    def __str__(self) -> str:
        return "\n".join(f"{name:<9} {value}" for name, value in self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        state = self.state
        if self.reason:
            state = f"{state}: {self.reason}"
        rows = [("run", self.run), ("state", state)]
        if self.jobs:
            rows.append(("jobs", _format_jobs(self.jobs, self.nodes)))
        if self.then:
            rows.append(("then", self.then))
        if self.steps is not None:
            progress = f"{self.step or 0} of {self.steps}"
            rows.append(("step", f"{progress}; latest checkpoint {self.checkpoint or 'none'}"))
        if self.loss is not None and self.tokens_per_second is not None:
            rows.append(("loss", format_loss(self.loss)))
            to_go = format_duration(self.eta_seconds)
            rows.append(("speed", f"{self.tokens_per_second:,.0f} tokens/s; {to_go} to go"))
        if self.restarts is not None:
            restarts = str(self.restarts)
            if self.last_error:
                restarts = f"{restarts}; last error: {self.last_error}"
            rows.append(("restarts", restarts))
        return rows

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


# -- reading a run ---------------------------------------------------------------------------------


def find_run_folder(path: str) -> Path:
    """Return the folder with the events of a run or of a data preparation.

    For a run it is the run folder, for a data preparation CORPUS.launch beside the corpus.

    Raises:
        UserError: the path is neither.
    """
    folder = Path(path)
    for candidate in (folder, folder.with_name(f"{folder.name}.launch")):
        if (candidate / events.FILE).is_file() or (candidate / "config.yaml").is_file():
            return candidate
    raise UserError(
        f"RUN: '{path}' is not a run folder (it has neither {events.FILE} nor config.yaml)"
    )


def read_status(folder: Path, query_ended: bool = True) -> RunStatus:
    """Collect what is known about a run.

    Args:
        folder: folder of the run.
        query_ended: whether Slurm is asked even about a run whose events say how it ended.
    """
    lines = events.read(folder)
    submitted = latest_submission(folder) or Submitted([])
    ended = bool(lines) and lines[-1]["event"] in RUN_END_EVENTS
    ask_slurm = bool(submitted.jobs) and (query_ended or not ended) and slurm.installed()
    known: dict[str, Job] = {}
    if ask_slurm:
        known = slurm.find_jobs(submitted.all_jobs)
    jobs = [known[job_id] for job_id in submitted.jobs if job_id in known]
    then = None
    if submitted.then in known:
        then = _describe_job(known[submitted.then])

    config = _read_config(folder)
    task = "data"
    if config:
        task = config.get("task", "pretrain")
    steps = (config.get("train") or {}).get("steps")
    recent = _last_steps(folder / metrics.FILE)
    last: dict[str, Any] = {}
    eta_seconds = None
    if recent:
        last = recent[-1]
        if steps is not None:
            step_seconds = statistics.median(line["seconds"] for line in recent)
            eta_seconds = step_seconds * (steps - last["step"])

    state, reason = _state(folder, lines, jobs, last.get("step"), steps)
    return RunStatus(
        run=str(folder),
        task=task,
        state=state,
        reason=reason,
        jobs=[f"{job.id} {job.state}" for job in jobs] or None,
        nodes=next((job.nodes for job in jobs if job.live and job.nodes), None),
        step=last.get("step"),
        steps=steps,
        loss=last.get("loss"),
        tokens_per_second=last.get("tokens_per_second"),
        eta_seconds=eta_seconds,
        checkpoint=latest_checkpoint(folder),
        then=then,
        **events.restarts(lines),
    )


def latest_submission(folder: Path) -> Submitted | None:
    """Return what the latest launch of a run submitted; None: nothing was submitted."""
    for launch_folder in reversed(launch_folders(folder)):
        # A launch may have been interrupted before it submitted anything.
        submitted = read_submitted(launch_folder)
        if submitted is not None:
            return submitted
    return None


def live_jobs(folder: Path) -> list[Job]:
    """Return the waiting and running jobs of all launches of a run, oldest first."""
    ids: list[str] = []
    for launch_folder in launch_folders(folder):
        submitted = read_submitted(launch_folder)
        if submitted is not None:
            ids += submitted.all_jobs
    if not ids or not slurm.installed():
        return []
    return slurm.find_live_jobs(ids)


def local_supervisor(lines: list[Event]) -> str | None:
    """Describe the process that supervises a run on this machine; None: no such process runs.

    The supervisor of a Slurm job does not count: ask Slurm about that job.
    """
    last = _last_state_event(lines)
    if last is None or last["event"] in RUN_END_EVENTS:
        return None
    is_without_slurm = "pid" in last and "job" not in last
    is_of_this_host = last.get("host") == os.uname().nodename
    if not is_without_slurm or not is_of_this_host:
        return None
    with suppress(OSError):
        # By now, another process may have this number.
        if b"launch" in Path(f"/proc/{last['pid']}/cmdline").read_bytes():
            return f"process {last['pid']} on host {last['host']}"
    return None


def _last_state_event(lines: list[Event]) -> Event | None:
    for line in reversed(lines):
        if line["event"] in _STATE_EVENTS:
            return line
    return None


# -- the state of a run ----------------------------------------------------------------------------


def _state(
    folder: Path, lines: list[Event], jobs: list[Job], step: int | None, steps: int | None
) -> tuple[str, str | None]:
    """State and reason: from Slurm while it has a live job, otherwise from the run's own files."""
    live = [job for job in jobs if job.live]
    live_states = [job.state for job in live]
    for state in ("RUNNING", "COMPLETING"):
        if state in live_states:
            return state, None
    if live:
        return live[0].state, _explain_pending(live[0])
    holder = lock.describe_holder(folder) or local_supervisor(lines)
    if holder is not None:
        return "RUNNING", holder
    array_state = _array_state(lines)
    if array_state is not None:
        return array_state
    last = _last_state_event(lines)
    if last is not None and last["event"] in RUN_END_EVENTS:
        return last["event"].upper(), last.get("reason")
    if jobs:
        return _state_of_ended_job(jobs[-1])
    if last is not None and last["event"] == "started":
        return "LOST", "it ended without a record; run the same command again to continue"
    if step is not None and step == steps:
        return "FINISHED", None
    return "IDLE", None


def _state_of_ended_job(job: Job) -> tuple[str, str]:
    """State of a run whose job ended without writing an event."""
    said = f"Slurm says {job.state} of job {job.id}"
    if job.state == "CANCELLED":
        return "CANCELLED", said
    if job.state in _FAILED_JOB_STATES:
        return "FAILED", said
    return "LOST", (
        f"Slurm no longer has job {job.id}, and it did not record how it ended; launch it again to"
        " continue"
    )


def _array_state(lines: list[Event]) -> tuple[str, str | None] | None:
    """State of a job array: that of its worst task, or FINISHED when all tasks have finished.

    None: it is not an array, or some tasks still have to finish and none has ended badly.
    """
    last: dict[int, Event] = {}
    for line in events.since_submission(lines):
        if "task" in line and line["event"] in _STATE_EVENTS:
            last[line["task"]] = line
    for name in ("failed", "cancelled", "stopped"):
        for task, line in sorted(last.items()):
            if line["event"] == name:
                return name.upper(), f"task {task}: {line.get('reason', '')}"
    if last and all(line["event"] == "finished" for line in last.values()):
        return "FINISHED", None
    return None


def _describe_job(job: Job) -> str:
    reason = _explain_pending(job)
    if reason is None:
        return f"{job.id} {job.state}"
    return f"{job.id} {job.state}: {reason}"


def _explain_pending(job: Job) -> str | None:
    """Slurm's reason why a job is pending, and what it means; None: it is not pending."""
    if not job.reason:
        return None
    # "(ReqNodeNotAvail, UnavailableNodes:n1)" -> "ReqNodeNotAvail"
    name = job.reason.strip("()").split(",")[0]
    if name not in _REASONS:
        return job.reason
    return f"{job.reason} ({_REASONS[name]})"


def _read_config(folder: Path) -> dict[str, Any]:
    """The resolved config of a run, or else of its latest launch; {} if neither has one."""
    launches = reversed(launch_folders(folder))
    for parent in [folder, *launches]:
        try:
            content = yaml.safe_load((parent / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(content, dict):
            return content
    return {}


def _last_steps(path: Path) -> list[dict[str, Any]]:
    """The last training steps in metrics.jsonl, oldest first. Reads only the end of the file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _METRICS_TAIL_BYTES))
            raw_lines = file.read().splitlines()
    except OSError:
        return []
    if size > _METRICS_TAIL_BYTES:
        # The first line is incomplete.
        raw_lines = raw_lines[1:]
    steps: list[dict[str, Any]] = []
    for raw in reversed(raw_lines):
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if metrics.is_step(line):
            steps.append(line)
        if len(steps) == _RECENT_STEPS:
            break
    return steps[::-1]


# -- formatting ------------------------------------------------------------------------------------


def format_loss(loss: float | str) -> str:
    # metrics.jsonl has a string for a loss that is not finite.
    if isinstance(loss, float):
        return f"{loss:.4f}"
    return str(loss)


def _format_jobs(jobs: list[str], nodes: str | None) -> str:
    shown = ", ".join(jobs[:_SHOWN_JOBS])
    if len(jobs) > _SHOWN_JOBS:
        shown += ", ..."
    if nodes:
        shown += f" on {nodes}"
    return shown


def format_duration(seconds: float | None) -> str:
    """Format seconds, for example as "2 d 03:04:05"; None as "?"."""
    if seconds is None:
        return "?"
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    if days:
        return f"{days} d {clock}"
    return clock

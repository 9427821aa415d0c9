"""What a run looks like from outside: from its files, its events, and what Slurm says."""

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
from llada.training import lock

Event = dict[str, Any]
"""A line of events.jsonl."""

_METRICS_TAIL_BYTES = 1 << 18
_RECENT_STEPS = 20
"""Steps whose median gives the speed."""
_END_EVENTS = ("finished", "failed", "stopped", "cancelled")
_ATTEMPT_EVENTS = ("submitted", "started", "requeued")
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
    "DependencyNeverSatisfied": ("waits for a job that can no longer succeed; cancel this one"),
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
    "JobHeldUser": "is held; `scontrol release` lets it go",
    "JobHeldAdmin": "is held by an administrator",
    "launch failed requeued held": (
        "could not be started and is held; `scontrol release` lets it try again"
    ),
    "Cleaning": "its earlier attempt is being cleaned up",
    "Licenses": "waits for a licence",
}
"""What Slurm's reasons for a pending job mean."""


@dataclass(frozen=True)
class RunStatus:
    """A run from outside, as `llada status --json` prints it; what is not known is None.

    Attributes:
        run: its folder.
        task: pretrain, sft, or "data".
        state: RUNNING, PENDING, COMPLETING, FINISHED, STOPPED, CANCELLED, FAILED, LOST, or IDLE:
            nothing runs, and nothing ended it.
        reason: why it is pending, or why it ended.
        jobs: the jobs of its latest launch, as "id state".
        nodes: where it runs.
        step, steps: done, and in all.
        loss, tokens_per_second: of the last step.
        eta_seconds: until the last step, at the present speed.
        checkpoint: step of the latest complete one.
        attempt, restarts, last_error: of the latest launch.
        then: the job that waits for the run to finish, as "id state: reason".
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


# -- what is known of a run ------------------------------------------------------------------------


def find_run_folder(path: str) -> Path:
    """Return the folder with a run's events.

    That is the run's own folder; for a corpus in preparation it is CORPUS.launch beside the corpus.

    Raises:
        UserError: there is none.
    """
    folder = Path(path)
    for candidate in (folder, folder.with_name(f"{folder.name}.launch")):
        if (candidate / events.FILE).is_file() or (candidate / "config.yaml").is_file():
            return candidate
    raise UserError(
        f"RUN: '{path}' is not a run folder (it has neither {events.FILE} nor config.yaml)"
    )


def read_status(folder: Path, query_ended: bool = True) -> RunStatus:
    """Collect what is known of a run.

    Args:
        folder: of the run.
        query_ended: ask Slurm about the jobs of a run that itself wrote how it ended, too.
    """
    lines = events.read(folder)
    submitted = latest_submission(folder) or Submitted([])
    ended = bool(lines) and lines[-1]["event"] in _END_EVENTS
    known: dict[str, Job] = {}
    if submitted.jobs and (query_ended or not ended) and slurm.installed():
        known = slurm.find_jobs(submitted.all_jobs)
    jobs = [known[job_id] for job_id in submitted.jobs if job_id in known]
    then = None
    if submitted.then in known:
        waiting = known[submitted.then]
        then = f"{waiting.id} {waiting.state}{_colon_reason(waiting)}"

    config = _read_config(folder)
    steps = (config.get("train") or {}).get("steps")
    recent = _last_steps(folder / "metrics.jsonl")
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
        # Data preparation has no config.
        task=config.get("task", "pretrain") if config else "data",
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
    """Return what the latest launch of a run submitted; None: nothing yet."""
    for launch_folder in reversed(launch_folders(folder)):
        # A launch may have been interrupted before it submitted.
        submitted = read_submitted(launch_folder)
        if submitted is not None:
            return submitted
    return None


def live_jobs(folder: Path) -> list[Job]:
    """Return the jobs of a run that Slurm still has, of all its launches; oldest first."""
    ids: list[str] = []
    for launch_folder in launch_folders(folder):
        submitted = read_submitted(launch_folder)
        if submitted is not None:
            ids += submitted.all_jobs
    if not ids or not slurm.installed():
        return []
    return slurm.find_live_jobs(ids)


def local_supervisor(lines: list[Event]) -> str | None:
    """Describe the supervisor of a run on this machine; None: there is none that is alive.

    Of a supervisor in a job, Slurm knows more.
    """
    last = _last_event(lines, (*_ATTEMPT_EVENTS, *_END_EVENTS))
    if last is None or last["event"] in _END_EVENTS or "job" in last or "pid" not in last:
        return None
    if last.get("host") != os.uname().nodename:
        return None
    with suppress(OSError):
        # Another process may have its number by now.
        if b"launch" in Path(f"/proc/{last['pid']}/cmdline").read_bytes():
            return f"process {last['pid']} on host {last['host']}"
    return None


def _last_event(lines: list[Event], names: tuple[str, ...]) -> Event | None:
    for line in reversed(lines):
        if line["event"] in names:
            return line
    return None


# -- its state -------------------------------------------------------------------------------------


def _state(
    folder: Path, lines: list[Event], jobs: list[Job], step: int | None, steps: int | None
) -> tuple[str, str | None]:
    """State and reason: from Slurm while a job lives, then from the run's own files."""
    live = [job for job in jobs if job.live]
    live_states = [job.state for job in live]
    for state in ("RUNNING", "COMPLETING"):
        if state in live_states:
            return state, None
    if live:
        return live[0].state, _colon_reason(live[0]).removeprefix(": ") or None
    holder = lock.holder(folder) or local_supervisor(lines)
    if holder is not None:
        return "RUNNING", holder
    array_state = _array_state(lines)
    if array_state is not None:
        return array_state
    last = _last_event(lines, (*_ATTEMPT_EVENTS, *_END_EVENTS))
    if last is not None and last["event"] in _END_EVENTS:
        return last["event"].upper(), last.get("reason")
    if jobs:
        return _state_of_ended_job(jobs[-1])
    if last is not None and last["event"] == "started":
        return "LOST", "it ended without a record; run the same command again to continue"
    if step is not None and step == steps:
        return "FINISHED", None
    return "IDLE", None


def _state_of_ended_job(job: Job) -> tuple[str, str]:
    """State of a run that wrote no end itself."""
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
    """State of a job array: the worst of its tasks.

    None: it is no array, or none of its tasks has ended badly and not all have ended.
    """
    last: dict[int, Event] = {}
    for line in events.since_submission(lines):
        if "task" in line and line["event"] in ("started", "requeued", *_END_EVENTS):
            last[line["task"]] = line
    for name in ("failed", "cancelled", "stopped"):
        for task, line in sorted(last.items()):
            if line["event"] == name:
                return name.upper(), f"task {task}: {line.get('reason', '')}"
    if last and all(line["event"] == "finished" for line in last.values()):
        return "FINISHED", None
    return None


def _colon_reason(job: Job) -> str:
    """Return ": Reason (what it means)" for a pending job, otherwise an empty string."""
    if not job.reason:
        return ""
    # "(ReqNodeNotAvail, UnavailableNodes:n1)" -> "ReqNodeNotAvail"
    meaning = _REASONS.get(job.reason.strip("()").split(",")[0])
    if meaning is None:
        return f": {job.reason}"
    return f": {job.reason} ({meaning})"


def _read_config(folder: Path) -> dict[str, Any]:
    """The run's resolved config, from the run or from its latest launch; {} without one."""
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
    """The last training steps of a metrics.jsonl, oldest first; the file is not read whole."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _METRICS_TAIL_BYTES))
            raw_lines = file.read().splitlines()
    except OSError:
        return []
    if size > _METRICS_TAIL_BYTES:
        # The first line is cut.
        raw_lines = raw_lines[1:]
    steps: list[dict[str, Any]] = []
    for raw in reversed(raw_lines):
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        # Other lines are validations.
        if "loss" in line:
            steps.append(line)
        if len(steps) == _RECENT_STEPS:
            break
    return steps[::-1]


# -- formatting ------------------------------------------------------------------------------------


def format_loss(loss: float | str) -> str:
    # metrics.jsonl holds a loss that is not finite as a string.
    if isinstance(loss, float):
        return f"{loss:.4f}"
    return str(loss)


def _format_jobs(jobs: list[str], nodes: str | None) -> str:
    shown = ", ".join(jobs[:8])
    if len(jobs) > 8:
        shown += ", ..."
    if nodes:
        shown += f" on {nodes}"
    return shown


def format_duration(seconds: float | None) -> str:
    """Format seconds as "2 d 03:04:05"; "?" where they are not known."""
    if seconds is None:
        return "?"
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    if days:
        return f"{days} d {clock}"
    return clock

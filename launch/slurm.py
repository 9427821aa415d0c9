"""Slurm's commands, called without a shell, and what their output means. Standard library only.

Everything that this package asks Slurm, or asks of it, goes through here.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

from llada.errors import RunError, UserError

LIVE_STATES = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "SIGNALING",
)
_COMMAND_TIMEOUT = 60.0
"""Seconds after which a command counts as not answering."""
_TRIES = 3
_CONTROLLER_AWAY = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Connection refused|Zero Bytes were"
    r" transmitted|not responding"
)
"""What Slurm's commands print while its controller is being restarted."""
CONTROLLER_PATIENCE = 900.0
"""Seconds that a job waits for the controller: a run must not end because the controller was away
when a node failed.
"""
_DURATION = re.compile(
    r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?"
)
# squeue's letters: job id, state, reason, node list.
_SQUEUE_FORMAT = "%i|%T|%r|%N"


class Job(NamedTuple):
    """A job as Slurm sees it.

    Attributes:
        id: as Slurm prints it; 12_3 for task 3 of array 12.
        state: RUNNING, PENDING, COMPLETED, FAILED, ...; UNKNOWN when Slurm no longer has it.
        reason: why it is pending, as Slurm names it; "" otherwise.
        nodes: where it runs, in Slurm's short form.
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def live(self) -> bool:
        return self.state in LIVE_STATES


def installed() -> bool:
    """Return whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def require() -> None:
    """Raise UserError on a machine without Slurm."""
    if not installed():
        raise UserError(
            "launch: no Slurm on this machine (no sbatch in PATH); run this on a login node, or"
            " start the run here with --local"
        )


def duration_seconds(text: str) -> int:
    """Convert one of Slurm's durations to seconds.

    Slurm reads a clock from the right unless days come before it:
    ``90`` is 90 minutes, ``1:30`` is 90 seconds, ``2:00:00`` is two hours, but ``1-12`` is a day
    and twelve hours and ``1-12:30`` a day, twelve hours and thirty minutes.

    Raises:
        ValueError: not a duration, as UNLIMITED.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not a duration")
    clock = [int(part) for part in match.group("first", "second", "third") if part is not None]
    if match["days"] is not None:
        # After days come hours, minutes, seconds; those on the right may be left out.
        hours, minutes, seconds = [*clock, 0, 0][:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(clock) == 1:
        return clock[0] * 60
    # Without days, those on the left are left out: seconds come last.
    hours, minutes, seconds = [0, *clock][-3:]
    return hours * 3600 + minutes * 60 + seconds


# -- running a command -----------------------------------------------------------------------------


def run_command(
    *words: str, tries: int = 1, patience: float = 0.0, sleep: Callable[[float], None] = time.sleep
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; the signals that end a job do not interrupt it.

    Args:
        words: of the command.
        tries: attempts when the command cannot be run or does not answer.
        patience: seconds in which it is repeated while Slurm's controller is away.
        sleep: waits between two attempts.

    Raises:
        RunError: it could not be run, or did not answer in time, `tries` times.
    """
    problem = ""
    give_up = time.monotonic() + patience
    for attempt in range(tries):
        if attempt:
            sleep(2.0 * attempt)
        try:
            answer = _run_once(words)
            while _controller_is_away(answer) and time.monotonic() <= give_up:
                sleep(5.0)
                answer = _run_once(words)
            return answer
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
    raise RunError(f"{words[0]}: {problem}")


def _run_once(words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    # When a job ends, Slurm signals every process of it. This command has to finish first.
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT,
        preexec_fn=ignore_stop_signals,
    )


def _controller_is_away(answer: subprocess.CompletedProcess[str]) -> bool:
    return answer.returncode != 0 and _CONTROLLER_AWAY.search(answer.stderr) is not None


def ignore_stop_signals() -> None:
    """Ignore the signals that ask a run to stop; runs in a child before its program starts."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


# -- jobs ------------------------------------------------------------------------------------------


def find_jobs(ids: list[str]) -> dict[str, Job]:
    """Look up jobs by id.

    squeue knows the recent ones. The others come from scontrol or, where there is accounting, from
    sacct; what nobody knows is UNKNOWN.
    """
    if not ids:
        return {}
    jobs = {job.id: job for job in _squeue(ids)}
    unlisted = [job_id for job_id in ids if job_id not in jobs]
    for job_id in unlisted:
        jobs[job_id] = _scontrol(job_id) or Job(job_id, "UNKNOWN")
    forgotten = [job_id for job_id in unlisted if jobs[job_id].state == "UNKNOWN"]
    for job in _sacct(forgotten):
        jobs[job.id] = job
    return jobs


def find_live_jobs(ids: list[str]) -> list[Job]:
    """Return the jobs that wait, run or are being ended, in the order of `ids`.

    This is one call of squeue, however many ids there are.
    """
    if not ids:
        return []
    jobs = {job.id: job for job in _squeue(ids)}
    return [jobs[job_id] for job_id in ids if job_id in jobs and jobs[job_id].live]


def _squeue(ids: list[str]) -> list[Job]:
    # --states=all: a requeued job that is still being cleaned up is listed, too.
    # Not --jobs: a single id that Slurm no longer has would fail the whole call.
    answer = run_command(
        "squeue",
        "--noheader",
        "--me",
        "--array",
        "--states=all",
        f"--format={_SQUEUE_FORMAT}",
        tries=_TRIES,
    )
    if answer.returncode:
        raise RunError(f"squeue: {_last_line(answer.stderr)}")
    requested = set(ids)
    jobs = []
    for job_id, state, reason, nodes in _rows(answer.stdout, columns=4):
        if job_id in requested:
            jobs.append(Job(job_id, state, _pending_reason(state, reason), nodes))
    return jobs


def _scontrol(job_id: str) -> Job | None:
    fields = show_job(job_id)
    if not fields:
        return None
    state = fields.get("JobState", "UNKNOWN")
    reason = _pending_reason(state, fields.get("Reason", ""))
    nodes = fields.get("NodeList", "").replace("(null)", "")
    return Job(job_id, state, reason, nodes)


def _sacct(ids: list[str]) -> list[Job]:
    """Jobs from the accounting database; none where there is no database or no sacct."""
    if not ids or not shutil.which("sacct"):
        return []
    try:
        answer = run_command(
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            "--format=JobID,State",
            f"--jobs={','.join(ids)}",
        )
    except RunError:
        return []
    jobs = []
    for job_id, state in _rows(answer.stdout, columns=2):
        if job_id in ids:
            # "CANCELLED by 1000" says more than the state.
            jobs.append(Job(job_id, state.split(" ")[0]))
    return jobs


def show_job(job_id: str, patience: float = 0.0) -> dict[str, str]:
    """Return the fields that `scontrol show job` prints.

    Empty when Slurm no longer has the job, or does not answer; for `patience` see `run_command`.
    """
    try:
        answer = run_command(
            "scontrol", "--oneliner", "show", "job", job_id, tries=_TRIES, patience=patience
        )
    except RunError:
        return {}
    if not answer.stdout.strip():
        return {}
    return dict(re.findall(r"(\w[\w:/]*)=(\S*)", answer.stdout.splitlines()[0]))


def _pending_reason(state: str, reason: str) -> str:
    """Slurm keeps an old reason while a job runs, and prints None where it has none."""
    if state != "PENDING" or reason == "None":
        return ""
    return reason


def requeue(job_id: str, sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Put the running job back into the queue; returns None, or Slurm's refusal."""
    answer = run_command(
        "scontrol", "requeue", job_id, tries=_TRIES, patience=CONTROLLER_PATIENCE, sleep=sleep
    )
    return _refusal(answer)


def update(job_id: str, *fields: str) -> str | None:
    """Change fields (Name=value) of a pending job; returns None, or Slurm's refusal."""
    answer = run_command(
        "scontrol",
        "update",
        f"JobId={job_id}",
        *fields,
        tries=_TRIES,
        patience=CONTROLLER_PATIENCE,
    )
    return _refusal(answer)


def cancel(*job_ids: str) -> str | None:
    """Cancel jobs or job steps; returns None, or Slurm's refusal."""
    if not job_ids:
        return None
    return _refusal(run_command("scancel", *job_ids, tries=_TRIES))


def send_signal(name: str, target: str, batch: bool = False) -> str | None:
    """Signal all tasks of a job step (JOB.STEP) or, with `batch`, a job's batch script."""
    options = [f"--signal={name}"]
    if batch:
        options.append("--batch")
    return _refusal(run_command("scancel", *options, target))


def own_job_id(array: bool) -> str | None:
    """Return the id of the job that this process belongs to, as Slurm's commands take it.

    A task of an array is ARRAY_TASK: its bare number may be that of the whole array.
    """
    if array:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


# -- nodes and partitions --------------------------------------------------------------------------


def expand_hostnames(nodes: str) -> list[str]:
    """Return ["n1", "n2"] for Slurm's "n[1-2]"."""
    answer = run_command("scontrol", "show", "hostnames", nodes, tries=_TRIES)
    names = answer.stdout.split()
    if answer.returncode or not names:
        raise RunError(f"scontrol show hostnames {nodes}: {_last_line(answer.stderr)}")
    return names


def unreachable_nodes(names: list[str]) -> list[str]:
    """Return those of the nodes that Slurm counts as down or not answering."""
    answer = run_command(
        "sinfo", "--noheader", "--Node", "--format=%N|%T", f"--nodes={','.join(names)}"
    )
    unreachable = set()
    for name, state in _rows(answer.stdout, columns=2):
        # An asterisk after the state means that the node does not answer.
        if state.endswith("*") or state.startswith(("down", "fail")):
            unreachable.add(name)
    return sorted(unreachable & set(names))


def partitions() -> dict[str, str]:
    """Return partitions with their time limits as Slurm prints them ("infinite": none)."""
    answer = run_command("sinfo", "--all", "--noheader", "--format=%R|%l", tries=_TRIES)
    if answer.returncode:
        raise UserError(f"launch: Slurm does not answer ({_last_line(answer.stderr)})")
    return {name: limit for name, limit in _rows(answer.stdout, columns=2)}


def count_partition_nodes(partition: str) -> int:
    """Return how many nodes a partition has, whatever their state; 0 when Slurm does not say."""
    try:
        answer = run_command(
            "sinfo",
            "--noheader",
            f"--partition={partition}",
            "--Node",
            "--format=%N",
            tries=_TRIES,
        )
    except RunError:
        return 0
    return len(set(answer.stdout.split()))


# -- reading output --------------------------------------------------------------------------------


def _rows(output: str, columns: int) -> list[list[str]]:
    """Lines of `columns` fields between bars; other lines, such as warnings, are left out."""
    rows = [line.split("|") for line in output.splitlines()]
    return [row for row in rows if len(row) == columns]


def _refusal(answer: subprocess.CompletedProcess[str]) -> str | None:
    if answer.returncode == 0:
        return None
    return _last_line(answer.stderr)


def _last_line(text: str) -> str:
    """The last line of an error output, without the command's name before it."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return "no reason given"
    return re.sub(r"^\w+:? (error: )?", "", lines[-1])

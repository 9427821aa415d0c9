"""Runs Slurm's commands, without a shell, and parses their output. Standard library only.

The rest of this package talks to Slurm only through this module, except to submit and start jobs.
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
"""Seconds after which a command is given up."""
_TRIES = 3
_CONTROLLER_UNREACHABLE = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Connection refused|Zero Bytes were"
    r" transmitted|not responding"
)
"""What Slurm's commands print while its controller is being restarted."""
CONTROLLER_PATIENCE = 900.0
"""Seconds that a job waits for the controller: a run must not end because the controller was
unreachable just when a node failed.
"""
_DURATION = re.compile(
    r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d{1,2}))?(?::(?P<third>\d{1,2}))?"
)
# Job id, state, reason, node list.
_SQUEUE_FORMAT = "%i|%T|%r|%N"


class Job(NamedTuple):
    """A job as Slurm sees it.

    Attributes:
        id: id as Slurm prints it; 12_3 for task 3 of array 12.
        state: RUNNING, PENDING, COMPLETED, FAILED, ...; UNKNOWN if Slurm has forgotten the job.
        reason: Slurm's name for why the job is pending; "" if it is not pending.
        nodes: nodes it runs on, in Slurm's short form, for example n[1-2].
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

    Without days, the last number is seconds, unless it is the only one: ``90`` is 90 minutes,
    ``1:30`` is 90 seconds, ``2:00:00`` is two hours. After days, the first number is hours:
    ``1-12`` is a day and twelve hours, ``1-12:30`` a day, twelve hours and thirty minutes.

    Raises:
        ValueError: not a duration, for example UNLIMITED.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not a duration")
    clock = [int(part) for part in match.group("first", "second", "third") if part is not None]
    if match["days"] is not None:
        # Hours, minutes, seconds; numbers on the right may be missing.
        hours, minutes, seconds = [*clock, 0, 0][:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(clock) == 1:
        return clock[0] * 60
    # Numbers on the left may be missing.
    hours, minutes, seconds = [0, *clock][-3:]
    return hours * 3600 + minutes * 60 + seconds


# -- running a command -----------------------------------------------------------------------------


def run_command(
    *words: str, tries: int = 1, patience: float = 0.0, sleep: Callable[[float], None] = time.sleep
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. The signals that end a job do not interrupt it.

    Args:
        words: program and arguments.
        tries: number of tries if the command cannot be run or does not answer in time.
        patience: seconds during which the command is repeated if Slurm's controller is unreachable.
        sleep: function that waits between two tries.

    Raises:
        RunError: the command could not be run or did not answer in time, `tries` times.
    """
    problem = ""
    give_up = time.monotonic() + patience
    for attempt in range(tries):
        if attempt:
            sleep(2.0 * attempt)
        try:
            answer = _run_once(words)
            while _controller_is_unreachable(answer) and time.monotonic() <= give_up:
                sleep(5.0)
                answer = _run_once(words)
            return answer
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
    raise RunError(f"{words[0]}: {problem}")


def _run_once(words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    # When Slurm ends a job it signals all its processes, but this command has to finish.
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT,
        preexec_fn=ignore_stop_signals,
    )


def _controller_is_unreachable(answer: subprocess.CompletedProcess[str]) -> bool:
    return answer.returncode != 0 and _CONTROLLER_UNREACHABLE.search(answer.stderr) is not None


def ignore_stop_signals() -> None:
    """Ignore the signals that ask a run to stop. Called in a child before its program starts."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


# -- jobs ------------------------------------------------------------------------------------------


def find_jobs(ids: list[str]) -> dict[str, Job]:
    """Look up jobs by id.

    squeue lists recent jobs. Others are looked up with scontrol and, if the cluster has accounting,
    with sacct. A job that none of them knows is UNKNOWN.
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
    """Return the jobs that are waiting, running or being ended, in the order of `ids`.

    Calls squeue once, however many ids there are.
    """
    if not ids:
        return []
    jobs = {job.id: job for job in _squeue(ids)}
    return [jobs[job_id] for job_id in ids if job_id in jobs and jobs[job_id].live]


def _squeue(ids: list[str]) -> list[Job]:
    # --states=all also lists a requeued job that is still being cleaned up.
    # Not --jobs: the call would fail if Slurm has forgotten a single one of the ids.
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
    """Jobs from the accounting database; none if there is no database or no sacct."""
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
            # The state may be followed by more: "CANCELLED by 1000".
            jobs.append(Job(job_id, state.split(" ")[0]))
    return jobs


def show_job(job_id: str, patience: float = 0.0) -> dict[str, str]:
    """Return the fields that `scontrol show job` prints.

    Empty if Slurm has forgotten the job or does not answer. For `patience` see `run_command`.
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
    """The reason why a job is pending; "" if it is not, or if there is none."""
    # Slurm keeps an old reason while a job is running.
    if state != "PENDING" or reason == "None":
        return ""
    return reason


def requeue(job_id: str, sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Put a running job back into the queue; returns None, or Slurm's refusal."""
    answer = run_command(
        "scontrol", "requeue", job_id, tries=_TRIES, patience=CONTROLLER_PATIENCE, sleep=sleep
    )
    return _refusal(answer)


def update(job_id: str, *fields: str) -> str | None:
    """Change fields of a pending job, each Name=value; returns None, or Slurm's refusal."""
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
    """Send a signal to all tasks of a job step, or to the batch script of a job.

    Args:
        name: name of the signal, for example USR1.
        target: id of the step, JOB.STEP, or of the job.
        batch: whether the target is a job, of which only the batch script gets the signal.

    Returns:
        None, or Slurm's refusal.
    """
    options = [f"--signal={name}"]
    if batch:
        options.append("--batch")
    return _refusal(run_command("scancel", *options, target))


def own_job_id(array: bool) -> str | None:
    """Return the id of this process's job for Slurm's commands; None: it is in no job.

    The id of an array task is ARRAY_TASK. Slurm also gives each task a number of its own, but one
    of these numbers is that of the whole array.
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
    """Return the nodes that are down or do not answer, out of `names`."""
    answer = run_command(
        "sinfo", "--noheader", "--Node", "--format=%N|%T", f"--nodes={','.join(names)}"
    )
    unreachable = set()
    for name, state in _rows(answer.stdout, columns=2):
        # An asterisk after the state means that the node does not answer.
        does_not_answer = state.endswith("*")
        is_down = state.startswith(("down", "fail"))
        if does_not_answer or is_down:
            unreachable.add(name)
    return sorted(unreachable & set(names))


def partitions() -> dict[str, str]:
    """Return partition -> time limit, as Slurm prints it; "infinite": no limit."""
    answer = run_command("sinfo", "--all", "--noheader", "--format=%R|%l", tries=_TRIES)
    if answer.returncode:
        raise UserError(f"launch: Slurm does not answer ({_last_line(answer.stderr)})")
    return {name: limit for name, limit in _rows(answer.stdout, columns=2)}


def count_partition_nodes(partition: str) -> int:
    """Return how many nodes a partition has, whatever their state; 0: Slurm does not say."""
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
    """Lines with `columns` fields between bars. Other lines, such as warnings, are skipped."""
    rows = [line.split("|") for line in output.splitlines()]
    return [row for row in rows if len(row) == columns]


def _refusal(answer: subprocess.CompletedProcess[str]) -> str | None:
    if answer.returncode == 0:
        return None
    return _last_line(answer.stderr)


def _last_line(text: str) -> str:
    """The last line of an error output, without the name of the command."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return "no reason given"
    return re.sub(r"^\w+:? (error: )?", "", lines[-1])

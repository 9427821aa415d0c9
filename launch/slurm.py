"""What is asked of Slurm: its commands, called without a shell. Standard library only."""

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

LIVE = (
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
_TIMEOUT = 60.0
_TRIES = 3
_AWAY = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Connection refused|Zero Bytes were"
    r" transmitted|not responding"
)
"""What Slurm's commands say while its controller is being restarted."""
PATIENCE = 900.0
"""Seconds that a job waits for the controller: a run must not end because it was away when a node
failed.
"""
_FORMAT = "%i|%T|%r|%N|%M|%l|%S|%P|%E"


class Job(NamedTuple):
    """A job as Slurm sees it.

    Attributes:
        id: as Slurm prints it; 12_3 for task 3 of array 12.
        state: RUNNING, PENDING, COMPLETED, FAILED, ...; UNKNOWN when Slurm no longer has it.
        reason: why it is pending, as Slurm names it; "" otherwise.
        nodes: where it runs, in Slurm's short form.
        elapsed, limit: run time so far and allowed, as D-HH:MM:SS.
        start: when it is expected to start, or started; "N/A" when Slurm does not know.
        source: "squeue", "sacct" or "scontrol".
    """

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    limit: str = ""
    start: str = "N/A"
    source: str = ""

    @property
    def live(self) -> bool:
        return self.state in LIVE


def installed() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def require() -> None:
    """Raises UserError on a machine without Slurm."""
    if not installed():
        raise UserError(
            "launch: no Slurm on this machine (no sbatch in PATH); run this on a login node, or"
            " start the run here with --local"
        )


def call(
    *words: str, tries: int = 1, patience: float = 0.0, sleep: Callable[[float], None] = time.sleep
) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's; it is not interrupted by the signals that end a job.

    Args:
        words: of the command.
        tries: when it cannot be run or does not answer.
        patience: seconds in which it is tried again while Slurm's controller is away.
        sleep: waits between two tries.

    Raises:
        RunError: it could not be run, or did not answer in time, `tries` times.
    """
    problem = ""
    end = time.monotonic() + patience
    for attempt in range(tries):
        if attempt:
            sleep(2.0 * attempt)
        try:
            while True:
                # In a job that ends, Slurm signals every process: this one has to finish first.
                answer = subprocess.run(
                    words,
                    capture_output=True,
                    text=True,
                    timeout=_TIMEOUT,
                    preexec_fn=_ignore_stops,
                )
                if (
                    answer.returncode == 0
                    or not _AWAY.search(answer.stderr)
                    or time.monotonic() > end
                ):
                    return answer
                sleep(5.0)
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
    raise RunError(f"{words[0]}: {problem}")


def _ignore_stops() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def jobs(ids: list[str]) -> dict[str, Job]:
    """States of jobs by id: squeue's; of those it no longer lists sacct's where there is
    accounting, else scontrol's; else UNKNOWN.
    """
    if not ids:
        return {}
    found = {job.id: job for job in _squeue(ids)}
    for job_id in (left := [job_id for job_id in ids if job_id not in found]):
        found[job_id] = _scontrol(job_id) or Job(job_id, "UNKNOWN")
    gone = [job_id for job_id in left if found[job_id].state == "UNKNOWN"]
    return found | {job.id: job for job in _sacct(gone)}


def live(ids: list[str]) -> list[Job]:
    """Those of the jobs that wait, run or are being ended, in the order of `ids`; one question,
    however many there are.
    """
    known = {job.id: job for job in (_squeue(ids) if ids else [])}
    return [known[one] for one in ids if one in known and known[one].live]


def _squeue(ids: list[str]) -> list[Job]:
    # All states: a requeued job that is still being cleaned up is listed, too. Not by id: one that
    # is gone would fail the whole call.
    answer = call(
        "squeue",
        "--noheader",
        "--me",
        "--array",
        "--states=all",
        f"--format={_FORMAT}",
        tries=_TRIES,
    )
    if answer.returncode:
        raise RunError(f"squeue: {_last_line(answer.stderr)}")
    rows = [
        line.split("|")
        for line in answer.stdout.splitlines()
        if line.count("|") == _FORMAT.count("|")
    ]
    wanted = set(ids)
    return [
        Job(
            row[0],
            row[1],
            row[2] if row[1] == "PENDING" and row[2] != "None" else "",
            row[3],
            row[4],
            row[5],
            row[6],
            "squeue",
        )
        for row in rows
        if row[0] in wanted
    ]


def _scontrol(job_id: str) -> Job | None:
    fields = describe(job_id)
    if not fields:
        return None
    state, reason = fields.get("JobState", "UNKNOWN"), fields.get("Reason", "")
    nodes = fields.get("NodeList", "")
    return Job(
        job_id,
        state,
        reason if state == "PENDING" and reason != "None" else "",
        "" if nodes == "(null)" else nodes,
        fields.get("RunTime", ""),
        fields.get("TimeLimit", ""),
        fields.get("StartTime", "N/A"),
        "scontrol",
    )


def describe(job_id: str, patience: float = 0.0) -> dict[str, str]:
    """What `scontrol show job` says of one job; empty when Slurm no longer has it, or does not
    answer (with `patience`, see `call`).
    """
    try:
        answer = call(
            "scontrol", "--oneliner", "show", "job", job_id, tries=_TRIES, patience=patience
        )
    except RunError:
        return {}
    return (
        dict(re.findall(r"(\w[\w:/]*)=(\S*)", answer.stdout.splitlines()[0]))
        if answer.stdout.strip()
        else {}
    )


def _sacct(ids: list[str]) -> list[Job]:
    """Jobs from the accounting database; none where there is no database or no sacct."""
    if not ids or not shutil.which("sacct"):
        return []
    columns = "JobID,State,NodeList,Elapsed,Timelimit,Start"
    try:
        answer = call(
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            f"--format={columns}",
            f"--jobs={','.join(ids)}",
        )
    except RunError:
        return []
    rows = [
        line.split("|")
        for line in answer.stdout.splitlines()
        if line.count("|") == columns.count(",")
    ]
    # "CANCELLED by 1000" says more than the state.
    return [
        Job(row[0], row[1].split(" ")[0], "", row[2], row[3], row[4], row[5], "sacct")
        for row in rows
        if row[0] in ids
    ]


def hostnames(nodes: str) -> list[str]:
    """["n1", "n2"] of Slurm's "n[1-2]"."""
    answer = call("scontrol", "show", "hostnames", nodes, tries=_TRIES)
    if answer.returncode or not answer.stdout.split():
        raise RunError(f"scontrol show hostnames {nodes}: {_last_line(answer.stderr)}")
    return answer.stdout.split()


def unreachable(names: list[str]) -> list[str]:
    """Those of the nodes that Slurm counts as down or not answering."""
    answer = call("sinfo", "--noheader", "--Node", "--format=%N|%T", f"--nodes={','.join(names)}")
    rows = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 1]
    return sorted(
        {name for name, state in rows if state.endswith("*") or state.startswith(("down", "fail"))}
        & set(names)
    )


def partitions() -> dict[str, str]:
    """Partitions and their time limits as Slurm prints them ("infinite": none)."""
    answer = call("sinfo", "--all", "--noheader", "--format=%R|%l", tries=_TRIES)
    if answer.returncode:
        raise UserError(f"launch: Slurm does not answer ({_last_line(answer.stderr)})")
    return dict(line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 1)


def nodes_of_partition(name: str) -> int:
    """How many nodes a partition has, whatever their state; 0 when Slurm does not say."""
    try:
        answer = call(
            "sinfo", "--noheader", f"--partition={name}", "--Node", "--format=%N", tries=_TRIES
        )
    except RunError:
        return 0
    return len(set(answer.stdout.split()))


def requeue(job_id: str, sleep: Callable[[float], None] = time.sleep) -> str | None:
    """Put the running job back into the queue; None, or what Slurm says against it."""
    answer = call("scontrol", "requeue", job_id, tries=_TRIES, patience=PATIENCE, sleep=sleep)
    return None if answer.returncode == 0 else _last_line(answer.stderr)


def update(job_id: str, *fields: str) -> str | None:
    """Change fields (Name=value) of a pending job; None, or what Slurm says against it."""
    answer = call("scontrol", "update", f"JobId={job_id}", *fields, tries=_TRIES, patience=PATIENCE)
    return None if answer.returncode == 0 else _last_line(answer.stderr)


def cancel(*job_ids: str) -> str | None:
    """Cancel jobs or job steps; None, or what Slurm says against it."""
    if not job_ids:
        return None
    answer = call("scancel", *job_ids, tries=_TRIES)
    return None if answer.returncode == 0 else _last_line(answer.stderr)


def send_signal(name: str, target: str, batch: bool = False) -> str | None:
    """Signal a job's batch script, or all tasks of a step (JOB.STEP)."""
    answer = call("scancel", f"--signal={name}", *(["--batch"] if batch else []), target)
    return None if answer.returncode == 0 else _last_line(answer.stderr)


def own_job(array: bool) -> str | None:
    """The job that this process belongs to, as Slurm's commands take it: the bare number of an
    array's last task means all of its tasks.
    """
    if array:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"^\w+:? (error: )?", "", lines[-1]) if lines else "no reason given"

"""`llada stop`: ends a run with a checkpoint, in Slurm jobs or on this machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from launch import slurm
from launch.job.spec import STOP_FILE, launch_folders
from launch.slurm import Job
from launch.status import live_jobs, local_supervisor
from llada import events
from llada.errors import RunError, UserError
from llada.training import lock


def stop_run(folder: Path) -> str:
    """Ask a run to end with a checkpoint, and cancel its jobs that wait in the queue.

    Returns:
        A line for the console that says what was done.

    Raises:
        UserError: the run is on another machine, without Slurm.
        RunError: Slurm does not send the signal.
    """
    # First the files: a job that is starting or being requeued looks for them.
    for launch_folder in launch_folders(folder):
        (launch_folder / STOP_FILE).touch()
    jobs = live_jobs(folder)
    if not jobs:
        return _stop_on_this_machine(folder)
    running = [job for job in jobs if job.state in ("RUNNING", "SUSPENDED")]
    ending = [job for job in jobs if job.state == "COMPLETING"]
    waiting = [job for job in jobs if job not in running and job not in ending]
    slurm.cancel(*(job.id for job in waiting))
    for job in running:
        refusal = slurm.send_signal("USR1", job.id, batch=True)
        if refusal is not None:
            raise RunError(f"stop: job {job.id}: {refusal}")
    done = []
    if running:
        done.append(f"job {_ids(running)} stops with a checkpoint after its step")
    if waiting:
        done.append(f"job {_ids(waiting)} is cancelled")
    if ending:
        done.append(f"job {_ids(ending)} is ending; if it is requeued, it stops at once")
    return f"{folder}: {'; '.join(done)}"


def _ids(jobs: list[Job]) -> str:
    return ", ".join(job.id for job in jobs)


def _stop_on_this_machine(folder: Path) -> str:
    process = lock.holding_process(folder)
    if process is None:
        if local_supervisor(events.read(folder)) is not None:
            return f"{folder}: starting or waiting to restart; it will stop before the next attempt"
        return f"{folder}: nothing runs, so there is nothing to stop"
    host, pid = process
    if host != os.uname().nodename:
        raise UserError(f"stop: '{folder}' is held by process {pid} on host {host}; stop it there")
    os.kill(pid, signal.SIGUSR1)
    return f"{folder}: process {pid} stops with a checkpoint after its step"

"""Writes the folder of a launch, and submits its job with submitit or runs it on this machine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from launch.job.spec import JOB_FILE, SUBMITTED_FILE, Submitted
from launch.submit.sbatch import PreparedJob
from launch.submit.snapshot import take_snapshot
from llada.config import RunConfig, to_yaml
from llada.errors import UserError
from llada.events import EventLog
from llada.files import write_atomically


def write_launch_folder(job: PreparedJob, config: RunConfig | None = None) -> None:
    """Write the snapshot of the code, the resolved config and the job's description.

    A job that uses the snapshot of another does not write it again.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    code = Path(job.spec.code)
    if not code.exists():
        take_snapshot(code)
    (Path(job.spec.run_folder) / "logs").mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_atomically(job.folder / "config.yaml", to_yaml(config))
    write_atomically(job.folder / JOB_FILE, job.spec.to_json())


def submit(job: PreparedJob, dependency: str | None = None) -> str:
    """Submit a job whose folder is written; returns the job's id.

    Args:
        job: job to submit.
        dependency: dependency in sbatch's notation, for example afterok:17; None: no dependency.

    Raises:
        UserError: Slurm refuses the job; the message has Slurm's reason.
    """
    folder = job.folder / "submitit"
    folder.mkdir(exist_ok=True)
    executor = SlurmExecutor(folder=folder)
    executor.update_parameters(**job.parameters, dependency=dependency)
    try:
        with _clean_environment():
            return str(executor._submit_command(job.command).job_id)
    except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError) as error:
        raise UserError(f"launch: Slurm refuses the job: {_telling_line(str(error))}") from None


def check_with_slurm(job: PreparedJob) -> str:
    """Let Slurm check a batch script without submitting it; returns its estimate of the start.

    Raises:
        UserError: Slurm refuses the job; the message has Slurm's reason.
    """
    with _clean_environment():
        answer = subprocess.run(
            ["sbatch", "--test-only"],
            input=job.script(),
            capture_output=True,
            text=True,
            timeout=60,
        )
    line = _telling_line(answer.stderr)
    if answer.returncode:
        raise UserError(f"launch: Slurm refuses the job: {line}")
    return line


@contextmanager
def _clean_environment() -> Iterator[None]:
    """Hide the environment variables that would change a job without the profile saying so.

    Some set defaults of sbatch and srun; others belong to a job that this process may run in.
    """
    hidden = {}
    for name, value in os.environ.items():
        is_of_slurm = name.startswith(("SBATCH_", "SLURM_", "SRUN_"))
        if is_of_slurm and name != "SLURM_CONF":
            hidden[name] = value
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def record_submission(job: PreparedJob, submitted: Submitted, ranks: int | None = None) -> None:
    """Record what was submitted, for `llada status`, `llada stop` and the jobs themselves."""
    write_atomically(job.folder / SUBMITTED_FILE, submitted.to_json())
    supervisor: dict[str, str | int] = {}
    if not submitted.jobs:
        # On this machine, the supervisor replaces this process and keeps its process id.
        supervisor = {"host": socket.gethostname(), "pid": os.getpid()}
    EventLog(Path(job.spec.run_folder)).write(
        "submitted",
        jobs=submitted.jobs or None,
        then=submitted.then,
        folder=str(job.folder),
        **supervisor,
        ranks=ranks,
    )


def run_locally(job: PreparedJob) -> int:
    """Replace this process by the supervisor of the run, whose exit code becomes the command's."""
    words = [sys.executable, "-m", "launch.job.main", str(job.folder), "--local"]
    # With `-m`, Python prefers packages in the current folder: those of the snapshot.
    os.chdir(job.spec.code)
    sys.stdout.flush()
    os.execve(sys.executable, words, {**os.environ, "PYTHONPATH": job.spec.code})


def _telling_line(output: str) -> str:
    """Return the line of sbatch's output with its reason, or with the estimated start."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|failure|unrecognized|start at", line)]
    candidates = telling or lines or ["no reason given"]
    prefix = r"^(sbatch: )?(error: |allocation failure: )?(Batch job submission failed: )?"
    return re.sub(prefix, "", candidates[-1])

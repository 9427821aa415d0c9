"""Writes the folder of a launch, and submits its job (through submitit) or runs it here."""

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

    A job that shares the snapshot of another does not write it again.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    code = Path(job.spec.code)
    if not code.exists():
        take_snapshot(code)
    (Path(job.spec.state) / "logs").mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_atomically(job.folder / "config.yaml", to_yaml(config))
    write_atomically(job.folder / JOB_FILE, job.spec.to_json())


def submit(job: PreparedJob, dependency: str | None = None) -> str:
    """Submit a job whose folder is written; returns its id.

    Args:
        job: to be submitted.
        dependency: as sbatch takes it, such as afterok:17; None: none.

    Raises:
        UserError: Slurm refuses it; its own reason is shown.
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
    """Let Slurm judge a batch script without submitting it; returns its estimate of the start.

    Raises:
        UserError: Slurm refuses it; its own reason is shown.
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
    """Hide the variables that would change a job behind the profile's back.

    These are defaults of sbatch and srun, and the variables of a job that this process runs in.
    """
    hidden = {}
    for name, value in os.environ.items():
        if name.startswith(("SBATCH_", "SLURM_", "SRUN_")) and name != "SLURM_CONF":
            hidden[name] = value
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def record_submission(job: PreparedJob, submitted: Submitted, ranks: int | None = None) -> None:
    """Write down what was submitted, for status, stop and the jobs themselves."""
    write_atomically(job.folder / SUBMITTED_FILE, submitted.to_json())
    supervisor: dict[str, str | int] = {}
    if not submitted.jobs:
        # On this machine the supervisor replaces this process, and keeps its number.
        supervisor = {"host": socket.gethostname(), "pid": os.getpid()}
    EventLog(Path(job.spec.state)).write(
        "submitted",
        jobs=submitted.jobs or None,
        then=submitted.then,
        folder=str(job.folder),
        **supervisor,
        ranks=ranks,
    )


def run_locally(job: PreparedJob) -> int:
    """Replace this process by the supervisor of the run, whose exit code is then the command's."""
    words = [sys.executable, "-m", "launch.job.main", str(job.folder), "--local"]
    # Python finds the packages of the snapshot before those of the checkout.
    os.chdir(job.spec.code)
    sys.stdout.flush()
    os.execve(sys.executable, words, {**os.environ, "PYTHONPATH": job.spec.code})


def _telling_line(output: str) -> str:
    """Return the line of sbatch's output that says why, or when the job would start."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|failure|unrecognized|start at", line)]
    candidates = telling or lines or ["no reason given"]
    prefix = r"^(sbatch: )?(error: |allocation failure: )?(Batch job submission failed: )?"
    return re.sub(prefix, "", candidates[-1])

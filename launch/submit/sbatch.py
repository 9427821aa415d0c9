"""From a config to a job: snapshot, job description, batch script, sbatch (through submitit), or
the same on this machine.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from launch.job import spec as jobs
from launch.job.spec import JobSpec, Restarts, Submitted
from launch.profile import ClusterProfile, Container, minutes
from launch.submit import snapshot
from launch.submit.environment import rank_environment
from llada.config import RunConfig, to_yaml
from llada.errors import UserError
from llada.events import EventLog
from llada.files import write_atomically


@dataclass(frozen=True)
class Prepared:
    """A launch that is ready to be submitted.

    Attributes:
        folder: RUN/launch/NNNN.
        spec: for the job.
        parameters: of submitit.
        command: last line of the batch script.
    """

    folder: Path
    spec: JobSpec
    parameters: dict[str, Any]
    command: str

    def script(self) -> str:
        """The batch script."""
        return str(_make_sbatch_string(command=self.command, folder=self.folder, **self.parameters))


def training(
    config: RunConfig,
    profile: ClusterProfile | None,
    nodes: int,
    ranks_per_node: int,
    folder: Path,
    options: Sequence[str] = (),
    chain: int = 1,
    rewind: int | None = None,
) -> Prepared:
    """The job of a run.

    Args:
        config: of the run.
        profile: of the cluster; None: this machine.
        nodes, ranks_per_node: its size.
        folder: RUN/launch/NNNN, perhaps not made yet.
        options: further words of the training command.
        chain: jobs that follow each other.
        rewind: step to go back to first.
    """
    state = Path(config.run.dir).absolute()
    spec = JobSpec(
        kind="train",
        state=str(state),
        directory=os.getcwd(),
        code=str(folder / "code"),
        command=[config.task, str(folder / "config.yaml"), *options],
        python=_python(profile),
        container=_apptainer(profile, folder / "code"),
        first=[] if rewind is None else ["--rewind", str(rewind)],
        nodes=nodes,
        tasks_per_node=ranks_per_node,
        environment=rank_environment(profile, config),
        srun=_srun(profile, folder / "code"),
        bind=profile is None or profile.numa_binding,
        preflight=_preflight(profile, ranks_per_node),
        exclude=profile.exclude if profile else [],
        chain=chain,
        restarts=_restarts(profile, chain),
    )
    if profile is None:
        return Prepared(folder, spec, {}, "")
    parameters = _common(profile, job_name(state), state, spec)
    parameters |= {
        "time": minutes(profile.time),
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "nodes": nodes,
        "ntasks_per_node": ranks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "exclusive": True if profile.exclusive else None,
    }
    if profile.memory_per_task_gb is not None:
        parameters["mem"] = (
            "0"
            if profile.memory_per_task_gb == 0
            else f"{int(profile.memory_per_task_gb * ranks_per_node * 1024)}M"
        )
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    if profile.gpu_request == "gpus-per-node":
        parameters["gpus_per_node"] = f"{kind}{ranks_per_node}"
    elif profile.gpu_request == "gres":
        parameters["gres"] = f"gpu:{kind}{ranks_per_node}"
    parameters["additional_parameters"] |= {"signal": f"B:USR1@{profile.signal_seconds}"}
    return Prepared(folder, spec, parameters, _command(folder, spec))


def single(
    profile: ClusterProfile,
    state: Path,
    folder: Path,
    code: Path,
    command: list[str],
    tasks: int | None = None,
) -> Prepared:
    """A job without GPUs, with events and logs in `state`; with `tasks` an array, whose task number
    stands for {task} in the command.
    """
    own = profile.cpu_jobs
    spec = JobSpec(
        kind="task",
        state=str(state),
        directory=os.getcwd(),
        code=str(code),
        command=command,
        python=_python(profile),
        container=_apptainer(profile, code),
        environment=rank_environment(profile, None),
        srun=_pyxis(profile.environment.container, code),
        exclude=profile.exclude,
        array=tasks is not None,
        restarts=_restarts(profile, 1),
    )
    parameters = _common(profile, job_name(state), state, spec)
    parameters |= {
        "time": minutes(own.time or profile.time),
        "partition": own.partition or profile.partition,
        "account": own.account or profile.account,
        "qos": own.qos or profile.qos,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": own.cpus,
        "exclusive": True if own.exclusive else None,
        "mem": None if own.memory_gb is None else f"{int(own.memory_gb * 1024)}M",
    }
    # The work that is done is kept: shortly before the limit is early enough.
    warning = min(60, minutes(own.time or profile.time) * 60 // 4)
    parameters["additional_parameters"] |= {"signal": f"B:USR1@{warning}"}
    if tasks is not None:
        parameters["additional_parameters"] |= {
            "array": f"0-{tasks - 1}",
            "output": str(state / "logs" / "job-%A_%a.log"),
        }
    return Prepared(folder, spec, parameters, _command(folder, spec))


def job_name(state: Path) -> str:
    """Name of a run's jobs: a chain's wait for each other by it, so no other run has it."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", state.name)
    digest = sha256(str(state).encode()).hexdigest()
    return f"llada-{name}-{digest[:8]}"


def write(prepared: Prepared, config: RunConfig | None = None) -> None:
    """Make the launch folder: snapshot of the code (unless it shares another's), resolved config,
    job description.
    """
    prepared.folder.mkdir(parents=True, exist_ok=True)
    if not Path(prepared.spec.code).exists():
        snapshot.take(Path(prepared.spec.code))
    (Path(prepared.spec.state) / "logs").mkdir(parents=True, exist_ok=True)
    if config is not None:
        write_atomically(prepared.folder / "config.yaml", to_yaml(config))
    write_atomically(prepared.folder / jobs.JOB, prepared.spec.to_json())


def send(prepared: Prepared, **changes: Any) -> str:
    """Submit; the job's id.

    Args:
        prepared: whose folder is written.
        changes: of the parameters, as a dependency.

    Raises:
        UserError: Slurm refuses it; its own reason is shown.
    """
    (prepared.folder / "submitit").mkdir(exist_ok=True)
    executor = SlurmExecutor(folder=prepared.folder / "submitit")
    executor.update_parameters(**prepared.parameters, **changes)
    try:
        with _clean_environment():
            return str(executor._submit_command(prepared.command).job_id)
    except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError) as error:
        raise UserError(f"launch: Slurm refuses the job: {_reason(str(error))}") from None


def check_with_slurm(prepared: Prepared) -> str:
    """Let Slurm judge the script without submitting it; what it says of the start.

    Raises:
        UserError: Slurm refuses it; its own reason is shown.
    """
    with _clean_environment():
        answer = subprocess.run(
            ["sbatch", "--test-only"],
            input=prepared.script(),
            capture_output=True,
            text=True,
            timeout=60,
        )
    if answer.returncode:
        raise UserError(f"launch: Slurm refuses the job: {_reason(answer.stderr)}")
    return _reason(answer.stderr)


@contextmanager
def _clean_environment() -> Iterator[None]:
    """Without the variables that would change the job behind the profile's back: defaults of
    sbatch, and those of a job one is in.
    """
    kept = {"SLURM_CONF"}
    removed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("SBATCH_", "SLURM_", "SRUN_")) and name not in kept
    }
    for name in removed:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(removed)


def note(prepared: Prepared, sent: Submitted, **fields: Any) -> None:
    """Keep what was submitted, for status, stop and the jobs themselves."""
    write_atomically(prepared.folder / jobs.SUBMITTED, sent.to_json())
    EventLog(Path(prepared.spec.state)).write(
        "submitted",
        jobs=sent.jobs or None,
        then=sent.then,
        folder=str(prepared.folder),
        # Of a run on this machine the supervisor goes on under this number.
        **({} if sent.jobs else {"host": socket.gethostname(), "pid": os.getpid()}),
        **fields,
    )


def run_here(prepared: Prepared) -> int:
    """Supervise the run from this process until it ends; its exit code."""
    words = [sys.executable, "-m", "launch.job.main", str(prepared.folder), "--local"]
    os.chdir(prepared.spec.code)  # the snapshot's packages are the ones that are found
    sys.stdout.flush()
    os.execve(sys.executable, words, {**os.environ, "PYTHONPATH": prepared.spec.code})


def _command(folder: Path, spec: JobSpec) -> str:
    code, job = shlex.quote(spec.code), shlex.quote(str(folder))
    python = shlex.quote(sys.executable)
    # The trap keeps a signal that comes before the supervisor stands for it: it is not deadly.
    lines = (
        f"cd {code} || exit 1",
        "trap '' USR1 TERM",
        f"PYTHONPATH={code} exec {python} -m launch.job.main {job}",
    )
    return "\n".join(lines)


def _common(profile: ClusterProfile, name: str, state: Path, spec: JobSpec) -> dict[str, Any]:
    environment = profile.environment
    setup = ["trap 'export LLADA_SIGNALLED=1' USR1 TERM"]
    if environment.modules:
        # Batch shells are no login shells: where `module` is a function, it has to be read in.
        setup.append("command -v module >/dev/null || . /etc/profile")
    setup += [f"module load {shlex.quote(module)} || exit 1" for module in environment.modules]
    setup += [f". {shlex.quote(path)} || exit 1" for path in environment.source]
    options: dict[str, Any] = {
        "output": str(state / "logs" / "job-%j.log"),
        "chdir": spec.directory,
        "requeue" if spec.restarts.requeue else "no-requeue": True,
    }
    if profile.reservation:
        options["reservation"] = profile.reservation
    return {
        "job_name": name,
        "constraint": profile.constraint,
        "exclude": ",".join(profile.exclude) or None,
        "setup": setup,
        "use_srun": False,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": {**options, **profile.sbatch},
    }


def _restarts(profile: ClusterProfile | None, chain: int) -> Restarts:
    if profile is None:
        return Restarts(backoff=5.0)
    own = profile.requeue
    reserve = min(60.0, profile.signal_seconds / 2)
    return Restarts(
        own.enabled and chain == 1, own.limit, own.backoff, own.grace, own.start_timeout, reserve
    )


def _preflight(profile: ClusterProfile | None, ranks_per_node: int) -> dict[str, Any] | None:
    if profile is None or not profile.preflight.enabled:
        return None
    rules = profile.preflight.model_dump()
    none = profile.gpu_request == "none" and rules["gpus"] is None
    return {
        **rules,
        "gpus": 0 if none else ranks_per_node if rules["gpus"] is None else rules["gpus"],
    }


def _python(profile: ClusterProfile | None) -> str:
    return sys.executable if profile is None else profile.environment.python or sys.executable


def _apptainer(profile: ClusterProfile | None, code: Path) -> list[str]:
    container = None if profile is None else profile.environment.container
    if container is None or container.kind != "apptainer":
        return []
    binds = [word for mount in container.mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", "--pwd", str(code), *binds, container.image]


def _srun(profile: ClusterProfile | None, code: Path) -> list[str]:
    if profile is None:
        return []
    # Since 22.05, srun no longer takes this from the job.
    cpus = [] if profile.cpus_per_task is None else [f"--cpus-per-task={profile.cpus_per_task}"]
    return [*cpus, *_pyxis(profile.environment.container, code), *profile.srun]


def _pyxis(container: Container | None, code: Path) -> list[str]:
    if container is None or container.kind != "pyxis":
        return []
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [f"--container-image={container.image}", f"--container-workdir={code}", *mounts]


def _reason(text: str) -> str:
    """The line of sbatch's answer that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = (
        [line for line in lines if re.search(r"error|failure|unrecognized|start at", line)]
        or lines
        or ["no reason given"]
    )
    return re.sub(
        r"^(sbatch: )?(error: |allocation failure: )?(Batch job submission failed: )?",
        "",
        telling[-1],
    )

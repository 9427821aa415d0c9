"""From a config and a profile to a job: its description and its batch script.

Nothing here is written or submitted; that is `launch.submit.submission`.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from launch.job.spec import JobSpec, Restarts
from launch.profile import ClusterProfile, Container, minutes
from launch.submit.environment import rank_environment
from llada.config import RunConfig

Parameters = dict[str, Any]
"""Keyword arguments of submitit, which makes the lines of the batch script from them."""


@dataclass(frozen=True)
class PreparedJob:
    """A job that is ready to be submitted.

    Attributes:
        folder: RUN/launch/NNNN.
        spec: what the job reads.
        parameters: of submitit.
        command: the last lines of the batch script.
    """

    folder: Path
    spec: JobSpec
    parameters: Parameters
    command: str

    def script(self) -> str:
        """Return the batch script."""
        return str(_make_sbatch_string(command=self.command, folder=self.folder, **self.parameters))


@dataclass(frozen=True)
class TrainingRequest:
    """What a launch asks for beyond config and profile.

    Attributes:
        nodes, ranks_per_node: size of the job.
        arguments: further words of the training command.
        chain: number of jobs that follow each other.
        rewind: step to go back to first; None: the latest checkpoint.
    """

    nodes: int = 1
    ranks_per_node: int = 1
    arguments: Sequence[str] = ()
    chain: int = 1
    rewind: int | None = None


def training_job(
    config: RunConfig, profile: ClusterProfile | None, request: TrainingRequest, folder: Path
) -> PreparedJob:
    """Prepare the job of a run.

    Args:
        config: of the run.
        profile: of the cluster; None: this machine.
        request: size and options.
        folder: RUN/launch/NNNN, which need not exist yet.
    """
    state = Path(config.run.dir).absolute()
    code = folder / "code"
    # The first start goes back; a restart after a failure must not.
    first = []
    if request.rewind is not None:
        first = ["--rewind", str(request.rewind)]
    spec = JobSpec(
        kind="train",
        state=str(state),
        directory=os.getcwd(),
        code=str(code),
        command=[config.task, str(folder / "config.yaml"), *request.arguments],
        python=_python(profile),
        container=_apptainer_words(profile, code),
        first=first,
        nodes=request.nodes,
        tasks_per_node=request.ranks_per_node,
        environment=rank_environment(profile, config),
        srun=_srun_options(profile, code),
        bind=profile is None or profile.numa_binding,
        preflight=_preflight_settings(profile, request.ranks_per_node),
        exclude=[] if profile is None else profile.exclude,
        chain=request.chain,
        restarts=_restarts(profile, request.chain),
    )
    if profile is None:
        return PreparedJob(folder, spec, {}, "")
    parameters = _training_parameters(profile, spec)
    return PreparedJob(folder, spec, parameters, _script_command(folder, spec))


def _training_parameters(profile: ClusterProfile, spec: JobSpec) -> Parameters:
    ranks = spec.tasks_per_node
    parameters = {
        **_common_parameters(profile, spec),
        "time": minutes(profile.time),
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "nodes": spec.nodes,
        "ntasks_per_node": ranks,
        "cpus_per_task": profile.cpus_per_task,
        # None leaves the option out; submitit would write --exclusive=False.
        "exclusive": profile.exclusive or None,
    }
    if profile.memory_per_task_gb == 0:
        # All of the node's.
        parameters["mem"] = "0"
    elif profile.memory_per_task_gb is not None:
        parameters["mem"] = f"{int(profile.memory_per_task_gb * ranks * 1024)}M"
    gpus = str(ranks)
    if profile.gpu_type:
        gpus = f"{profile.gpu_type}:{ranks}"
    if profile.gpu_request == "gpus-per-node":
        parameters["gpus_per_node"] = gpus
    elif profile.gpu_request == "gres":
        parameters["gres"] = f"gpu:{gpus}"
    # B: to the batch script alone, which forwards it to the ranks.
    parameters["additional_parameters"]["signal"] = f"B:USR1@{profile.signal_seconds}"
    return parameters


def single_job(
    profile: ClusterProfile,
    state: Path,
    folder: Path,
    code: Path,
    command: list[str],
    tasks: int | None = None,
) -> PreparedJob:
    """Prepare a job without GPUs: a task of data preparation, or a conversion.

    Args:
        profile: of the cluster.
        state: folder for events and logs.
        folder: for the description, which need not exist yet.
        code: snapshot of the code.
        command: words of the llada command; {task} stands for the number of the array task.
        tasks: of the array; None: no array.
    """
    spec = JobSpec(
        kind="task",
        state=str(state),
        directory=os.getcwd(),
        code=str(code),
        command=command,
        python=_python(profile),
        container=_apptainer_words(profile, code),
        environment=rank_environment(profile, None),
        srun=_pyxis_options(profile.environment.container, code),
        exclude=profile.exclude,
        array=tasks is not None,
        restarts=_restarts(profile, chain=1),
    )
    settings = profile.cpu_jobs
    time_limit = minutes(settings.time or profile.time)
    memory = None
    if settings.memory_gb is not None:
        memory = f"{int(settings.memory_gb * 1024)}M"
    parameters = {
        **_common_parameters(profile, spec),
        "time": time_limit,
        "partition": settings.partition or profile.partition,
        "account": settings.account or profile.account,
        "qos": settings.qos or profile.qos,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": settings.cpus,
        "exclusive": settings.exclusive or None,
        "mem": memory,
    }
    options = parameters["additional_parameters"]
    # The work that is done is kept, so that shortly before the limit is early enough.
    warning_seconds = min(60, time_limit * 60 // 4)
    options["signal"] = f"B:USR1@{warning_seconds}"
    if tasks is not None:
        options["array"] = f"0-{tasks - 1}"
        options["output"] = str(state / "logs" / "job-%A_%a.log")
    return PreparedJob(folder, spec, parameters, _script_command(folder, spec))


def job_name(state: Path) -> str:
    """Return the name of a run's jobs.

    No other run has it: the jobs of a chain wait for each other by their name.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", state.name)
    digest = sha256(str(state).encode()).hexdigest()
    return f"llada-{name}-{digest[:8]}"


# -- parts of the batch script ---------------------------------------------------------------------


def _script_command(folder: Path, spec: JobSpec) -> str:
    code = shlex.quote(spec.code)
    python = shlex.quote(sys.executable)
    lines = (
        f"cd {code} || exit 1",
        # From here on the supervisor has to handle the signals. exec keeps them ignored until it
        # does; they would end it otherwise.
        "trap '' USR1 TERM",
        f"PYTHONPATH={code} exec {python} -m launch.job.main {shlex.quote(str(folder))}",
    )
    return "\n".join(lines)


def _common_parameters(profile: ClusterProfile, spec: JobSpec) -> Parameters:
    """Parameters of submitit that all jobs share."""
    state = Path(spec.state)
    requeue = "requeue" if spec.restarts.requeue else "no-requeue"
    options: dict[str, str | int | bool] = {
        "output": str(state / "logs" / "job-%j.log"),
        "chdir": spec.directory,
        requeue: True,
    }
    if profile.reservation:
        options["reservation"] = profile.reservation
    return {
        "job_name": job_name(state),
        "constraint": profile.constraint,
        "exclude": ",".join(profile.exclude) or None,
        "setup": _setup_lines(profile),
        # The supervisor calls srun itself.
        "use_srun": False,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": {**options, **profile.sbatch},
    }


def _setup_lines(profile: ClusterProfile) -> list[str]:
    """Shell lines before the supervisor: modules and files to source."""
    environment = profile.environment
    # Modules may take a minute to load. A signal that comes meanwhile is kept for the supervisor.
    lines = ["trap 'export LLADA_SIGNALLED=1' USR1 TERM"]
    if environment.modules:
        # Batch shells are no login shells: where `module` is a function, it has to be read in.
        lines.append("command -v module >/dev/null || . /etc/profile")
    lines += [f"module load {shlex.quote(module)} || exit 1" for module in environment.modules]
    lines += [f". {shlex.quote(path)} || exit 1" for path in environment.source]
    return lines


def _restarts(profile: ClusterProfile | None, chain: int) -> Restarts:
    if profile is None:
        return Restarts(backoff=5.0)
    settings = profile.requeue
    return Restarts(
        # In a chain, the next job continues.
        requeue=settings.enabled and chain == 1,
        limit=settings.limit,
        backoff=settings.backoff,
        grace=settings.grace,
        start_timeout=settings.start_timeout,
        reserve=min(60.0, profile.signal_seconds / 2),
    )


def _preflight_settings(
    profile: ClusterProfile | None, ranks_per_node: int
) -> dict[str, float] | None:
    if profile is None or not profile.preflight.enabled:
        return None
    settings: dict[str, float] = profile.preflight.model_dump()
    if profile.preflight.gpus is not None:
        return settings
    # One GPU for each rank, unless the cluster has none.
    settings["gpus"] = ranks_per_node
    if profile.gpu_request == "none":
        settings["gpus"] = 0
    return settings


def _python(profile: ClusterProfile | None) -> str:
    if profile is None:
        return sys.executable
    return profile.environment.python or sys.executable


def _apptainer_words(profile: ClusterProfile | None, code: Path) -> list[str]:
    """Words before the command of a rank that lead into an Apptainer container."""
    if profile is None:
        return []
    container = profile.environment.container
    if container is None or container.kind != "apptainer":
        return []
    words = ["apptainer", "exec", "--nv", "--pwd", str(code)]
    for mount in container.mounts:
        words += ["--bind", mount]
    return [*words, container.image]


def _srun_options(profile: ClusterProfile | None, code: Path) -> list[str]:
    if profile is None:
        return []
    options = []
    if profile.cpus_per_task is not None:
        # Since Slurm 22.05, srun no longer takes this from the job.
        options.append(f"--cpus-per-task={profile.cpus_per_task}")
    return [*options, *_pyxis_options(profile.environment.container, code), *profile.srun]


def _pyxis_options(container: Container | None, code: Path) -> list[str]:
    """Options of srun that pyxis, its container plugin, reads."""
    if container is None or container.kind != "pyxis":
        return []
    options = [f"--container-image={container.image}", f"--container-workdir={code}"]
    if container.mounts:
        options.append(f"--container-mounts={','.join(container.mounts)}")
    return options

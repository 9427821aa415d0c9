"""Makes the description and the batch script of a job from a config and a profile.

Writes and submits nothing; `launch.submit.submission` does.
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
"""Keyword arguments of submitit, which turns them into the lines of the batch script."""


@dataclass(frozen=True)
class PreparedJob:
    """A job that is ready to be submitted.

    Attributes:
        folder: RUN/launch/NNNN.
        spec: description that the job reads.
        parameters: parameters of submitit.
        command: last lines of the batch script.
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
        arguments: further arguments of the training command.
        chain: number of jobs that follow each other.
        rewind: step of the checkpoint to go back to; None: the latest checkpoint.
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
        config: config of the run.
        profile: profile of the cluster; None: this machine.
        request: size of the job and options of the launch.
        folder: RUN/launch/NNNN, which need not exist yet.
    """
    run_folder = Path(config.run.dir).absolute()
    code = folder / "code"
    # The first start goes back to an earlier checkpoint; a restart after a failure must not.
    first_start_arguments = []
    if request.rewind is not None:
        first_start_arguments = ["--rewind", str(request.rewind)]
    bind = True
    exclude = []
    if profile is not None:
        bind = profile.numa_binding
        exclude = profile.exclude
    spec = JobSpec(
        kind="train",
        run_folder=str(run_folder),
        directory=os.getcwd(),
        code=str(code),
        command=[config.task, str(folder / "config.yaml"), *request.arguments],
        python=_python(profile),
        container=_apptainer_words(profile, code),
        first_start_arguments=first_start_arguments,
        nodes=request.nodes,
        tasks_per_node=request.ranks_per_node,
        environment=rank_environment(profile, config),
        srun=_srun_options(profile, code),
        bind=bind,
        preflight=_preflight_settings(profile, request.ranks_per_node),
        exclude=exclude,
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
        # None omits the option; submitit would turn False into --exclusive=False.
        "exclusive": profile.exclusive or None,
    }
    if profile.memory_per_task_gb == 0:
        # For Slurm, 0 is all memory of the node.
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
    # B: only the batch script gets the signal. The supervisor forwards it to the ranks.
    parameters["additional_parameters"]["signal"] = f"B:USR1@{profile.signal_seconds}"
    return parameters


def single_job(
    profile: ClusterProfile,
    run_folder: Path,
    folder: Path,
    code: Path,
    command: list[str],
    tasks: int | None = None,
) -> PreparedJob:
    """Prepare a job without GPUs: a task of data preparation, or a conversion.

    Args:
        profile: profile of the cluster.
        run_folder: folder for events and logs.
        folder: folder for the description, which need not exist yet.
        code: snapshot of the code.
        command: arguments of `llada`; {task} stands for the number of the array task.
        tasks: number of tasks of the job array; None: no array.
    """
    spec = JobSpec(
        kind="task",
        run_folder=str(run_folder),
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
    settings = profile.complete_cpu_jobs
    time_limit = minutes(settings.time or profile.time)
    memory = None
    if settings.memory_gb is not None:
        memory = f"{int(settings.memory_gb * 1024)}M"
    parameters = {
        **_common_parameters(profile, spec),
        "time": time_limit,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": settings.cpus,
        "exclusive": settings.exclusive or None,
        "mem": memory,
    }
    options = parameters["additional_parameters"]
    # Such a job keeps finished work, so it can be stopped shortly before its time limit.
    warning_seconds = min(60, time_limit * 60 // 4)
    options["signal"] = f"B:USR1@{warning_seconds}"
    if tasks is not None:
        options["array"] = f"0-{tasks - 1}"
        options["output"] = str(run_folder / "logs" / "job-%A_%a.log")
    return PreparedJob(folder, spec, parameters, _script_command(folder, spec))


def job_name(run_folder: Path) -> str:
    """Return the name of a run's jobs.

    It must be unique: Slurm runs the jobs of a chain one after another because they share it.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", run_folder.name)
    digest = sha256(str(run_folder).encode()).hexdigest()
    return f"llada-{name}-{digest[:8]}"


# -- parts of the batch script ---------------------------------------------------------------------


def _script_command(folder: Path, spec: JobSpec) -> str:
    code = shlex.quote(spec.code)
    python = shlex.quote(sys.executable)
    lines = (
        f"cd {code} || exit 1",
        # exec keeps these signals ignored until the supervisor handles them. They would end it
        # otherwise.
        "trap '' USR1 TERM",
        f"PYTHONPATH={code} exec {python} -m launch.job.main {shlex.quote(str(folder))}",
    )
    return "\n".join(lines)


def _common_parameters(profile: ClusterProfile, spec: JobSpec) -> Parameters:
    """Parameters of submitit that all jobs share."""
    run_folder = Path(spec.run_folder)
    requeue_option = "no-requeue"
    if spec.restarts.requeue:
        requeue_option = "requeue"
    options: dict[str, str | int | bool] = {
        "output": str(run_folder / "logs" / "job-%j.log"),
        "chdir": spec.directory,
        requeue_option: True,
    }
    if profile.reservation:
        options["reservation"] = profile.reservation
    return {
        "job_name": job_name(run_folder),
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
    # Loading modules may take a minute. This remembers a signal until the supervisor starts.
    lines = ["trap 'export LLADA_SIGNALLED=1' USR1 TERM"]
    if environment.modules:
        # Where `module` is a shell function, only login shells define it.
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
    """The command that runs a rank in an Apptainer container; empty without one."""
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
        # Since Slurm 22.05, srun does not inherit this option from the job.
        options.append(f"--cpus-per-task={profile.cpus_per_task}")
    return [*options, *_pyxis_options(profile.environment.container, code), *profile.srun]


def _pyxis_options(container: Container | None, code: Path) -> list[str]:
    """Options of srun for its container plugin, pyxis; empty without such a container."""
    if container is None or container.kind != "pyxis":
        return []
    options = [f"--container-image={container.image}", f"--container-workdir={code}"]
    if container.mounts:
        options.append(f"--container-mounts={','.join(container.mounts)}")
    return options

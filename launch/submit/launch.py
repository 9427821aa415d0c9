"""The steps of `llada launch`: check, prepare, submit, print what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer.main

from data_tools.cli import app as data_app
from launch import slurm
from launch.job.spec import LAUNCH_FOLDER, Submitted, make_numbered_folder
from launch.profile import ClusterProfile
from launch.status import live_jobs
from launch.submit import messages, sbatch, submission
from launch.submit.checks import CheckOptions, check_profile, check_run
from launch.submit.options import LaunchOptions
from launch.submit.sbatch import PreparedJob, TrainingRequest
from llada.errors import UserError
from llada.training.configure import load_config
from llada.training.lock import RunLock

_UNNUMBERED = "NNNN"
"""Name of the launch folder in the script of a dry run, which makes no folder."""


# -- a run -----------------------------------------------------------------------------------------


def launch_run(
    path: str, overrides: list[str] | None, profile: ClusterProfile | None, options: LaunchOptions
) -> int:
    """Launch a run; returns the exit code of the command.

    Args:
        path: config of the run, a YAML file.
        overrides: settings of the config, each "key.sub=value".
        profile: profile of the cluster; None: this machine.
        options: options of the command.

    Raises:
        UserError: something would keep the run from starting.
    """
    _check_options(profile, options)
    if profile is not None and not options.dry_run:
        slurm.require()
    config = load_config(path, overrides, rewind=options.rewind)
    request = _training_request(options)

    # Everything is checked before anything is written.
    run_folder = Path(config.run.dir).absolute()
    on_another_machine = profile is not None and options.dry_run and not slurm.installed()
    check_options = CheckOptions(
        allow_changed=options.allow_changed,
        rewind=options.rewind,
        data_may_be_missing=options.after is not None,
        elsewhere=on_another_machine,
    )
    preview = check_run(config, options.nodes * request.ranks_per_node, check_options)
    job = sbatch.training_job(config, profile, request, run_folder / LAUNCH_FOLDER / _UNNUMBERED)
    slurm_estimate = ""
    if profile is not None and slurm.installed():
        slurm_estimate = _check_with_cluster(job, profile, options)
    messages.print_plan(config, preview, options, request.ranks_per_node, slurm_estimate)
    if options.dry_run:
        if profile is not None:
            print(f"\n{job.script()}")
        return 0

    with _launch_lock(run_folder):
        job = sbatch.training_job(config, profile, request, _make_launch_folder(run_folder))
        submission.write_launch_folder(job, config)
        if profile is not None:
            _submit_run(job, profile, options)
            return 0
        submission.record_submission(job, Submitted([]), ranks=request.ranks_per_node)
    return submission.run_locally(job)


def _check_options(profile: ClusterProfile | None, options: LaunchOptions) -> None:
    if options.then not in (None, "convert"):
        raise UserError(f"--then: '{options.then}' is not allowed; it can be: convert")
    if profile is None:
        cluster_options = (
            ("--nodes", options.nodes, 1),
            ("--chain", options.chain, 1),
            ("--then", options.then, None),
            ("--after", options.after, None),
        )
        for name, value, default in cluster_options:
            if value != default:
                raise UserError(
                    f"{name}: {value} is for a cluster; --local runs on this machine alone"
                )
    elif options.gpus_per_node is None:
        raise UserError("--gpus-per-node is required: one rank per GPU")
    if options.after is not None and not options.after.isdigit():
        raise UserError(f"--after: '{options.after}' is not the number of a job")


def _training_request(options: LaunchOptions) -> TrainingRequest:
    arguments = []
    if options.allow_changed:
        arguments.append("--allow-changed")
    return TrainingRequest(
        nodes=options.nodes,
        ranks_per_node=options.gpus_per_node or _count_local_gpus(),
        arguments=arguments,
        chain=options.chain,
        rewind=options.rewind,
    )


def _count_local_gpus() -> int:
    """Number of GPUs of this machine; 1 without GPUs, for a single rank on the CPU."""
    import torch

    return max(1, torch.cuda.device_count())


def _check_with_cluster(job: PreparedJob, profile: ClusterProfile, options: LaunchOptions) -> str:
    """Check a launch against the cluster; returns Slurm's estimate of the start."""
    run_folder = Path(job.spec.run_folder)
    _refuse_second_job(run_folder)
    check_profile(profile)
    estimate = submission.check_with_slurm(job)
    if options.then is not None:
        folder = run_folder / "then" / LAUNCH_FOLDER / _UNNUMBERED
        submission.check_with_slurm(_conversion_job(job, profile, folder))
    return estimate


def _submit_run(job: PreparedJob, profile: ClusterProfile, options: LaunchOptions) -> None:
    """Submit the job of a run, or its chain of jobs, and the conversion after them."""
    dependencies = []
    if options.after is not None:
        dependencies.append(f"afterok:{options.after}")
    if options.chain > 1:
        # The jobs of a chain have the same name, and only one job of a name runs at a time.
        dependencies.append("singleton")
    dependency = ",".join(dependencies) or None
    jobs: list[str] = []
    then = None
    try:
        for _ in range(options.chain):
            jobs.append(submission.submit(job, dependency))
        if options.then is not None:
            then = _submit_conversion(job, profile, after=jobs[-1])
    except UserError as error:
        if not jobs:
            raise
        run = messages.shell_path(Path(job.spec.run_folder))
        raise UserError(
            f"{error}; job {', '.join(jobs)} is in the queue, `llada stop {run}` cancels it"
        ) from None
    finally:
        # Even if a later submission failed, these jobs are in the queue.
        if jobs:
            submission.record_submission(job, Submitted(jobs, then), ranks=job.spec.ranks)
    messages.print_next_steps(Path(job.spec.run_folder), Submitted(jobs, then))


def _submit_conversion(job: PreparedJob, profile: ClusterProfile, after: str) -> str:
    folder = _make_launch_folder(Path(job.spec.run_folder) / "then")
    conversion = _conversion_job(job, profile, folder)
    submission.write_launch_folder(conversion)
    job_id = submission.submit(conversion, f"afterok:{after}")
    submission.record_submission(conversion, Submitted([job_id]))
    return job_id


def _conversion_job(job: PreparedJob, profile: ClusterProfile, folder: Path) -> PreparedJob:
    """The job that writes RUN/hf after the run has finished. It uses the snapshot of the run."""
    run_folder = Path(job.spec.run_folder)
    code = Path(job.spec.code)
    command = ["convert", "to-hf", str(run_folder), str(run_folder / "hf"), "--verify", "--force"]
    conversion = sbatch.single_job(profile, run_folder / "then", folder, code, command)
    # Without this option, the job would wait forever if the run failed.
    options = {**conversion.parameters["additional_parameters"], "kill-on-invalid-dep": "yes"}
    parameters = {**conversion.parameters, "additional_parameters": options}
    return replace(conversion, parameters=parameters)


# -- data preparation ------------------------------------------------------------------------------


def launch_data(
    command: str,
    arguments: list[str],
    profile: ClusterProfile,
    tasks: int,
    dry_run: bool,
    after: str | None,
) -> None:
    """Launch `llada data COMMAND` as a job array.

    Args:
        command: "prepare" or "prepare-sft".
        arguments: options of that command.
        profile: profile of the cluster.
        tasks: number of tasks of the array.
        dry_run: whether the job is only printed, not submitted.
        after: id of a job that has to succeed first; None: no such job.

    Raises:
        UserError: something would keep the job from starting.
    """
    if not dry_run:
        slurm.require()
    options = _parse_data_options(command, arguments)
    output = Path(options["output"]).absolute()
    _check_data_options(options, output)
    # Events and logs are beside the corpus: its own folder exists only once it is complete.
    run_folder = output.with_name(f"{output.name}.launch")
    words = ["data", command, *arguments, "--task", "{task}", "--tasks", str(tasks)]

    def prepare(folder: Path) -> PreparedJob:
        return sbatch.single_job(profile, run_folder, folder, folder / "code", words, tasks)

    job = prepare(run_folder / LAUNCH_FOLDER / _UNNUMBERED)
    if slurm.installed():
        _refuse_second_job(run_folder)
        check_profile(profile)
        submission.check_with_slurm(job)
    messages.print_data_plan(command, arguments, tasks, profile.cpu_jobs.cpus, run_folder)
    if dry_run:
        print(f"\n{job.script()}")
        return
    with _launch_lock(run_folder):
        job = prepare(_make_launch_folder(run_folder))
        submission.write_launch_folder(job)
        dependency = None
        if after is not None:
            dependency = f"afterok:{after}"
        job_id = submission.submit(job, dependency)
        task_ids = [f"{job_id}_{number}" for number in range(tasks)]
        submission.record_submission(job, Submitted(task_ids))
    messages.print_next_data_steps(output, run_folder, job_id)


def _parse_data_options(command: str, arguments: list[str]) -> dict[str, Any]:
    """Parse options as `llada data COMMAND` parses them."""
    for word in arguments:
        if word.partition("=")[0] in ("--task", "--tasks"):
            raise UserError(
                f"{word}: is set for every task of the array; give --tasks once, before the other"
                " options"
            )
    # Typer contains its own copy of click, so neither the type of this group nor the types of the
    # errors have a public name.
    group: Any = typer.main.get_command(data_app)
    try:
        context = group.commands[command].make_context(f"llada data {command}", list(arguments))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise UserError(f"llada data {command}: {error.format_message()}") from None
    return dict(context.params)


def _check_data_options(options: dict[str, Any], output: Path) -> None:
    for source in options["input"]:
        if not source.startswith("hf:") and not _input_exists(source):
            raise UserError(f"--input: no file or folder '{source}'")
    if output.exists() and not options["force"]:
        raise UserError(f"--output: '{options['output']}' exists; --force replaces it")


def _input_exists(source: str) -> bool:
    """Return whether an input is a file, a folder, or a pattern that matches at least one."""
    if Path(source).exists():
        return True
    # Patterns of pathlib must not begin with a slash.
    if Path(source).is_absolute():
        return any(Path("/").glob(source[1:]))
    return any(Path().glob(source))


# -- one run folder, one job -----------------------------------------------------------------------


@contextmanager
def _launch_lock(run_folder: Path) -> Iterator[None]:
    """Let one launch of a run submit at a time, so that the second sees the job of the first."""
    folder = run_folder / LAUNCH_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder, beat=2.0)
    except OSError as error:
        raise UserError(
            f"run.dir: '{run_folder}' cannot be created ({error.strerror}); choose a writable"
            " folder"
        ) from None
    try:
        if slurm.installed():
            _refuse_second_job(run_folder)
        yield
    finally:
        lock.release()


def _refuse_second_job(run_folder: Path) -> None:
    """Refuse a run that has a job already. A second one would be refused only when it starts."""
    jobs = live_jobs(run_folder)
    if not jobs:
        return
    job = jobs[0]
    where = ""
    if job.nodes:
        where = f" on {job.nodes}"
    raise UserError(
        f"run.dir: '{run_folder}' belongs to job {job.id}, which is {job.state}{where};"
        f" `llada stop {messages.shell_path(run_folder)}` ends it, or choose another run.dir"
    )


def _make_launch_folder(run_folder: Path) -> Path:
    _, folder = make_numbered_folder(run_folder / LAUNCH_FOLDER)
    return folder

"""What `llada launch` prints: the plan of a run, and the commands to use once it is submitted."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path

from launch.job.spec import Submitted
from launch.submit.checks import RunPreview
from launch.submit.options import LaunchOptions
from llada.config import RunConfig


def print_plan(
    config: RunConfig,
    preview: RunPreview,
    options: LaunchOptions,
    ranks_per_node: int,
    slurm_estimate: str,
) -> None:
    """Print what a launch is about to do.

    Args:
        config: config of the run.
        preview: result of the checks.
        options: options of the command.
        ranks_per_node: number of ranks per node.
        slurm_estimate: line in which Slurm says when the job would start; "" without Slurm.
    """
    parallel = config.parallel
    batch = config.batch
    layout = (
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context}"
        f" x data {preview.data_parallel}"
    )
    machines = f"{options.nodes} nodes x {ranks_per_node} ranks"
    if options.local:
        machines = "this machine"
    ranks = options.nodes * ranks_per_node
    print(f"{config.task} in {config.run.dir}: {machines} = {ranks} ranks, {layout}")
    micro_batches = batch.global_ // (batch.micro * preview.data_parallel)
    print(
        f"per step: {batch.global_} sequences of {config.data.sequence_length} tokens,"
        f" {micro_batches} micro-batches of {batch.micro} per replica"
    )
    print(f"checkpoints: {preview.checkpoints} (every {config.checkpoint.every:,} steps)")
    start = "starts at step 0"
    if preview.start_step:
        start = f"continues from step {preview.start_step}"
    end = ""
    if preview.start_step >= preview.steps:
        end = ", its last step"
    print(f"{start} of {preview.steps}{end}")
    for note in preview.notes:
        print(note)
    if slurm_estimate:
        print(f"Slurm: {slurm_estimate}")
    if options.chain > 1:
        print(f"a chain of {options.chain} jobs, each after the one before")
    if options.then:
        output = Path(config.run.dir).absolute() / "hf"
        print(f"then: a job converts the last checkpoint to {output}")
    # Before the batch script, or the output of the run itself.
    sys.stdout.flush()


def print_next_steps(run_folder: Path, submitted: Submitted) -> None:
    """Print how to watch, stop and resume a run that was submitted."""
    run = shell_path(run_folder)
    jobs = ", ".join(submitted.jobs)
    if submitted.then:
        jobs = f"{jobs}, then job {submitted.then}"
    print(f"\nsubmitted job {jobs}")
    print(f"  job's log   {run_folder}/logs/job-{submitted.jobs[0]}.log")
    print(f"  ranks' logs {run_folder}/logs/attempt-NNNN/rank_NNNNN.log")
    print(f"  watch       llada status {run};  llada logs {run} -f")
    print(f"  stop        llada stop {run}")
    print("  resume      the same `llada launch` again, from the latest checkpoint")


def print_data_plan(
    command: str, arguments: list[str], tasks: int, cores: int, run_folder: Path
) -> None:
    """Print what the launch of a data preparation is about to do.

    Args:
        command: "prepare" or "prepare-sft".
        arguments: options of that command.
        tasks: number of tasks of the job array.
        cores: number of cores per task.
        run_folder: folder of the events and logs.
    """
    print(f"llada data {command} {shlex.join(arguments)}")
    print(f"{tasks} tasks of {cores} cores; events and logs in {run_folder}")


def print_next_data_steps(output: Path, run_folder: Path, job: str) -> None:
    """Print how to watch and stop a data preparation that was submitted."""
    corpus = shell_path(output)
    print(f"\nsubmitted job {job}: logs {run_folder}/logs/job-{job}_*.log")
    print(f"  llada status {corpus}")
    print(f"  llada logs {corpus} --task 0 -f")
    print(f"  llada stop {corpus}")
    print(f"  llada launch CONFIG ... --after {job}   starts a run when it is done")


def shell_path(path: Path) -> str:
    """Return a path as the user would type it: relative to the current folder if it is inside."""
    with suppress(ValueError):
        path = path.relative_to(os.getcwd())
    return shlex.quote(str(path))

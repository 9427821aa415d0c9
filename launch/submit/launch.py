"""What `llada launch` does, step by step: check, prepare, submit, say what comes next."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer.main

from data_tools.cli import app as data_app
from launch import slurm, status
from launch.job import spec as jobs
from launch.job.spec import Submitted
from launch.profile import ClusterProfile
from launch.submit import sbatch
from launch.submit.checks import Checked, check_profile, check_run
from launch.submit.sbatch import Prepared
from llada.config import RunConfig
from llada.errors import UserError
from llada.training.configure import load_config
from llada.training.lock import RunLock


@dataclass(frozen=True)
class LaunchOptions:
    """Of `llada launch CONFIG`; see the command's help."""

    nodes: int = 1
    gpus_per_node: int | None = None
    dry_run: bool = False
    local: bool = False
    chain: int = 1
    then: str | None = None
    after: str | None = None
    allow_changed: bool = False
    rewind: int | None = None


def launch_run(
    path: str, overrides: list[str] | None, profile: ClusterProfile | None, options: LaunchOptions
) -> int:
    """Launch a run; exit code of the command.

    Args:
        path, overrides: of the run's config.
        profile: of the cluster; None: this machine.
        options: see there.

    Raises:
        UserError: anything that would keep the run from starting.
    """
    _check_options(profile, options)
    if profile is not None and not options.dry_run:
        slurm.require()
    config = load_config(path, overrides, rewind=options.rewind)
    ranks_per_node = options.gpus_per_node or _gpus_here()
    elsewhere = profile is not None and options.dry_run and not slurm.installed()
    ranks = options.nodes * ranks_per_node
    checked = check_run(
        config, ranks, options.allow_changed, options.rewind, options.after is not None, elsewhere
    )
    state = Path(config.run.dir).absolute()
    words = ["--allow-changed"] if options.allow_changed else []

    def prepare(folder: Path) -> Prepared:
        return sbatch.training(
            config,
            profile,
            options.nodes,
            ranks_per_node,
            folder,
            words,
            options.chain,
            options.rewind,
        )

    prepared = prepare(state / jobs.FOLDER / "NNNN")
    said = ""
    if profile is not None and slurm.installed():
        _refuse_second(state)
        check_profile(profile)
        said = sbatch.check_with_slurm(prepared)
        if options.then is not None:
            sbatch.check_with_slurm(
                _conversion(prepared, profile, state / "then" / jobs.FOLDER / "NNNN")
            )
    _print_plan(config, checked, prepared, options, ranks_per_node, said)
    if options.dry_run:
        if profile is not None:
            print(f"\n{prepared.script()}")
        return 0
    with _only_launch(state):
        prepared = prepare(_new_launch(state))
        sbatch.write(prepared, config)
        if profile is not None:
            _submit(prepared, profile, options)
            return 0
        sbatch.note(prepared, Submitted([]), ranks=ranks_per_node)
    return sbatch.run_here(prepared)


@contextmanager
def _only_launch(state: Path) -> Iterator[None]:
    """Of two launches of a run at the same moment, the second finds the first one's job."""
    try:
        (state / jobs.FOLDER).mkdir(parents=True, exist_ok=True)
        own = RunLock(state / jobs.FOLDER, beat=2.0)
    except OSError as error:
        raise UserError(
            f"run.dir: '{state}' cannot be made ({error.strerror}); choose a folder that can be"
            " written"
        ) from None
    try:
        if slurm.installed():
            _refuse_second(state)
        yield
    finally:
        own.release()


def _submit(prepared: Prepared, profile: ClusterProfile, options: LaunchOptions) -> None:
    after = None if options.after is None else f"afterok:{options.after}"
    if options.chain > 1:
        after = "singleton" if after is None else f"{after},singleton"
    sent: list[str] = []
    then = None
    try:
        for _ in range(options.chain):
            sent.append(sbatch.send(prepared, dependency=after))
        if options.then is not None:
            then = _convert(prepared, profile, sent[-1])
    except UserError as error:
        queued = (
            f"; job {', '.join(sent)} is in the queue, `llada stop"
            f" {_short(Path(prepared.spec.state))}` cancels it"
            if sent
            else ""
        )
        raise UserError(f"{error}{queued}") from None
    finally:
        # What is in the queue has to be known, whatever happened after it.
        if sent:
            sbatch.note(prepared, Submitted(sent, then), ranks=prepared.spec.ranks)
    _print_next(prepared, sent, then)


def _conversion(prepared: Prepared, profile: ClusterProfile, folder: Path) -> Prepared:
    """The job that writes RUN/hf when the run has finished."""
    state = Path(prepared.spec.state)
    command = ["convert", "to-hf", str(state), str(state / "hf"), "--verify", "--force"]
    conversion = sbatch.single(profile, state / "then", folder, Path(prepared.spec.code), command)
    # Should the run fail, this job would wait for ever.
    extra = {**conversion.parameters["additional_parameters"], "kill-on-invalid-dep": "yes"}
    return replace(conversion, parameters={**conversion.parameters, "additional_parameters": extra})


def _convert(prepared: Prepared, profile: ClusterProfile, job: str) -> str:
    conversion = _conversion(prepared, profile, _new_launch(Path(prepared.spec.state) / "then"))
    sbatch.write(conversion)
    sent = sbatch.send(conversion, dependency=f"afterok:{job}")
    sbatch.note(conversion, Submitted([sent]))
    return sent


def launch_data(
    command: str,
    words: list[str],
    profile: ClusterProfile,
    tasks: int,
    dry_run: bool,
    after: str | None,
) -> None:
    """Launch `llada data COMMAND` as a job array.

    Args:
        command: prepare or prepare-sft.
        words: its options.
        profile: of the cluster.
        tasks: of the array.
        dry_run: print the plan only.
        after: id of the job that has to end well before.

    Raises:
        UserError: anything that would keep it from starting.
    """
    if not dry_run:
        slurm.require()
    options = _parse_data(command, words)
    output = Path(options["output"]).absolute()
    for source in options["input"]:
        if not source.startswith("hf:") and not _found(source):
            raise UserError(f"--input: no file or folder '{source}'")
    if output.exists() and not options["force"]:
        raise UserError(f"--output: '{options['output']}' exists; --force replaces it")
    state = output.with_name(f"{output.name}.launch")
    task = ["data", command, *words, "--task", "{task}", "--tasks", str(tasks)]
    folder = state / jobs.FOLDER / "NNNN"
    prepared = sbatch.single(profile, state, folder, folder / "code", task, tasks)
    if slurm.installed():
        _refuse_second(state)
        check_profile(profile)
        sbatch.check_with_slurm(prepared)
    print(
        f"llada data {command} {shlex.join(words)}\n{tasks} tasks of {profile.cpu_jobs.cpus} cores;"
        f" events and logs in {state}"
    )
    if dry_run:
        print(f"\n{prepared.script()}")
        return
    with _only_launch(state):
        folder = _new_launch(state)
        prepared = sbatch.single(profile, state, folder, folder / "code", task, tasks)
        sbatch.write(prepared)
        job = sbatch.send(prepared, dependency=None if after is None else f"afterok:{after}")
        sbatch.note(prepared, Submitted([f"{job}_{number}" for number in range(tasks)]))
    print(f"\nsubmitted job {job}: logs {state}/logs/job-{job}_*.log")
    print(
        f"  llada status {_short(output)}\n  llada logs {_short(output)} --task 0 -f\n  llada stop"
        f" {_short(output)}"
    )
    print(f"  llada launch CONFIG ... --after {job}   starts a run when it is done")


def _parse_data(command: str, words: list[str]) -> dict[str, Any]:
    """The options of `llada data COMMAND`, checked as that command checks them."""
    group: Any = typer.main.get_command(data_app)
    for word in words:
        if word.partition("=")[0] in ("--task", "--tasks"):
            raise UserError(
                f"{word}: is the number of the array's tasks; give --tasks once, before the other"
                " options"
            )
    try:
        return dict(
            group.commands[command].make_context(f"llada data {command}", list(words)).params
        )
    except Exception as error:  # typer brings a click of its own, whose errors have no public name
        if not hasattr(error, "format_message"):
            raise
        raise UserError(f"llada data {command}: {error.format_message()}") from None


def _found(source: str) -> bool:
    return Path(source).exists() or any(
        Path().glob(source) if not Path(source).is_absolute() else Path("/").glob(source[1:])
    )


def _check_options(profile: ClusterProfile | None, options: LaunchOptions) -> None:
    if options.then not in (None, "convert"):
        raise UserError(f"--then: '{options.then}' is not allowed; it can be: convert")
    if profile is None:
        for name, value, usual in (
            ("--nodes", options.nodes, 1),
            ("--chain", options.chain, 1),
            ("--then", options.then, None),
            ("--after", options.after, None),
        ):
            if value != usual:
                raise UserError(
                    f"{name}: {value} is for a cluster; --local runs on this machine alone"
                )
    elif options.gpus_per_node is None:
        raise UserError(
            "--gpus-per-node: missing; how many GPUs a node has, each of which gets a rank"
        )
    if options.after is not None and not options.after.isdigit():
        raise UserError(f"--after: '{options.after}' is no job's number")


def _gpus_here() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _refuse_second(state: Path) -> None:
    """One run folder, one job: a second one would only wait for the first to be refused then."""
    live = status.live_jobs(state)
    if live:
        where = f" on {live[0].nodes}" if live[0].nodes else ""
        raise UserError(
            f"run.dir: '{state}' belongs to job {live[0].id}, which is {live[0].state}{where};"
            f" `llada stop {_short(state)}` ends it, or choose another run.dir"
        )


def _new_launch(state: Path) -> Path:
    return jobs.next_folder(state / jobs.FOLDER)[1]


def _print_plan(
    config: RunConfig,
    checked: Checked,
    prepared: Prepared,
    options: LaunchOptions,
    per_node: int,
    said: str,
) -> None:
    p, batch = config.parallel, config.batch
    layout = (
        f"tensor {p.tensor} x pipeline {p.pipeline} x context {p.context} x data"
        f" {checked.data_parallel}"
    )
    where = "this machine" if options.local else f"{options.nodes} nodes x {per_node} ranks"
    micro = batch.global_ // (batch.micro * checked.data_parallel)
    print(
        f"{config.task} in {config.run.dir}: {where} = {options.nodes * per_node} ranks, {layout}"
    )
    print(
        f"a step: {batch.global_} sequences of {config.data.sequence_length} tokens, {micro}"
        f" micro-batches of {batch.micro} a replica"
    )
    print(f"checkpoints: {checked.checkpoints} (every {config.checkpoint.every:,} steps)")
    start = f"goes on from step {checked.first}" if checked.first else "starts at step 0"
    print(
        f"{start} of {checked.steps}"
        + (", which is its end" if checked.first >= checked.steps else "")
    )
    for note in checked.notes:
        print(note)
    if said:
        print(f"Slurm: {said}")
    if options.chain > 1:
        print(f"a chain of {options.chain} jobs, each after the one before")
    if options.then:
        print(f"then: a job converts the last checkpoint to {Path(prepared.spec.state) / 'hf'}")
    sys.stdout.flush()


def _print_next(prepared: Prepared, sent: list[str], then: str | None) -> None:
    state = Path(prepared.spec.state)
    run = _short(state)
    print(f"\nsubmitted job {', '.join(sent)}" + (f", then job {then}" if then else ""))
    print(f"  job's log   {state}/logs/job-{sent[0]}.log")
    print(f"  ranks' logs {state}/logs/attempt-NNNN/rank_NNNNN.log")
    print(f"  watch       llada status {run};  llada logs {run} -f")
    print(f"  stop        llada stop {run}")
    print("  resume      the same `llada launch` again, from the latest checkpoint")


def _short(path: Path) -> str:
    """A path as the user would type it."""
    try:
        return shlex.quote(str(path.relative_to(os.getcwd())))
    except ValueError:
        return shlex.quote(str(path))

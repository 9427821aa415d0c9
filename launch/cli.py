"""The commands `llada launch`, `status`, `logs`, `stop` and `runs`.

This module must be quick to import, so each command imports what it needs when it runs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from llada.errors import UserError

if TYPE_CHECKING:
    from launch.profile import ClusterProfile


class _LaunchGroup(TyperGroup):
    """Parses `llada launch CONFIG` as `llada launch run CONFIG`."""

    default_command = "run"

    # Typer contains its own copy of click, so the type of `ctx` has no public name.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # A first argument that is not the name of a command is a config.
        known = (*self.commands, "--help", "-h")
        if args and args[0] not in known:
            args = [self.default_command, *args]
        return list(super().parse_args(ctx, args))


launch_app = typer.Typer(
    cls=_LaunchGroup,
    no_args_is_help=True,
    help=(
        "Submit a run to Slurm, or start it on this machine. `llada launch CONFIG` is short for"
        " `llada launch run CONFIG`."
    ),
)

Cluster = Annotated[str | None, typer.Option(help="Cluster profile, a YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Profile setting to override, such as --set time=02:00:00; repeatable."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Check everything and print the plan and the script, but submit nothing."
    ),
]
After = Annotated[
    str | None, typer.Option(help="Start only after the job with this id has succeeded.")
]
Run = Annotated[str, typer.Argument(help="Run folder.")]


@launch_app.command("run")
def run(
    config: Annotated[
        str,
        typer.Argument(
            help="YAML config of the run; its `task` selects pretraining or fine-tuning."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to override, such as train.steps=100.")
    ] = None,
    cluster: Cluster = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs per node, one rank each; on a cluster without GPUs: ranks per node.",
        ),
    ] = None,
    set: Settings = None,
    dry_run: DryRun = False,
    local: Annotated[
        bool, typer.Option("--local", help="Run on this machine, in the foreground, without Slurm.")
    ] = False,
    chain: Annotated[
        int,
        typer.Option(
            min=1,
            help=(
                "Submit this many jobs that run one after another, for sites where jobs cannot"
                " requeue themselves."
            ),
        ),
    ] = 1,
    then: Annotated[
        str | None,
        typer.Option(help="convert: add a job that writes RUN/hf after the run has finished."),
    ] = None,
    after: After = None,
    allow_changed: Annotated[
        bool,
        typer.Option(
            "--allow-changed",
            help="Resume even if settings, data or versions have changed; the change is recorded.",
        ),
    ] = False,
    rewind: Annotated[
        int | None, typer.Option(min=0, help="First go back to the checkpoint of this step.")
    ] = None,
) -> None:
    """Submit a run, or start it on this machine with --local."""
    from launch.submit.launch import launch_run
    from launch.submit.options import LaunchOptions

    options = LaunchOptions(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        dry_run=dry_run,
        local=local,
        chain=chain,
        then=then,
        after=after,
        allow_changed=allow_changed,
        rewind=rewind,
    )
    profile = None
    if not local:
        profile = _load_profile(cluster, set)
    elif cluster is not None or set:
        raise UserError("--local takes no profile; drop --cluster and --set")
    raise typer.Exit(launch_run(config, overrides, profile, options))


_PASS_OPTIONS_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""The command passes unknown options on to `llada data`."""


def _launch_data(
    command: str,
    context: typer.Context,
    tasks: int,
    cluster: str | None,
    settings: list[str] | None,
    dry_run: bool,
    after: str | None,
) -> None:
    from launch.submit.launch import launch_data

    profile = _load_profile(cluster, settings)
    launch_data(command, list(context.args), profile, tasks, dry_run, after)


Tasks = Annotated[int, typer.Option(min=1, help="Number of tasks in the job array.")]


@launch_app.command("data-prepare", context_settings=_PASS_OPTIONS_ON)
def data_prepare(
    context: typer.Context,
    tasks: Tasks,
    cluster: Cluster = None,
    set: Settings = None,
    dry_run: DryRun = False,
    after: After = None,
) -> None:
    """Run `llada data prepare` as a job array; takes its options too."""
    _launch_data("prepare", context, tasks, cluster, set, dry_run, after)


@launch_app.command("data-prepare-sft", context_settings=_PASS_OPTIONS_ON)
def data_prepare_sft(
    context: typer.Context,
    tasks: Tasks,
    cluster: Cluster = None,
    set: Settings = None,
    dry_run: DryRun = False,
    after: After = None,
) -> None:
    """Run `llada data prepare-sft` as a job array; takes its options too."""
    _launch_data("prepare-sft", context, tasks, cluster, set, dry_run, after)


def _load_profile(cluster: str | None, settings: list[str] | None) -> ClusterProfile:
    from launch.profile import load_profile

    if cluster is None:
        raise UserError(
            "--cluster: missing; name the profile of your cluster (configs/clusters has two to"
            " start from), or use --local"
        )
    return load_profile(cluster, settings)


def status(
    run: Run, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Show the state, progress and last error of a run, or why it is pending."""
    from launch.status import find_run_folder, read_status

    run_status = read_status(find_run_folder(run))
    if as_json:
        typer.echo(json.dumps(run_status.as_dict(), indent=1))
    else:
        typer.echo(str(run_status))


def logs(
    run: Run,
    rank: Annotated[int, typer.Option(min=0, help="Rank whose log to print.")] = 0,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Attempt, counted from 1. Default: the latest.")
    ] = None,
    task: Annotated[int | None, typer.Option(min=0, help="Task of a data preparation.")] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Follow the log, through restarts, until the run ends."
        ),
    ] = False,
) -> None:
    """Print the log of a rank."""
    from launch.logs import LogChoice, follow_log, print_bytes, read_log
    from launch.status import find_run_folder

    choice = LogChoice(find_run_folder(run), rank, attempt, task)
    try:
        if follow:
            print_bytes(follow_log(choice))
        else:
            print_bytes([read_log(choice)])
    except BrokenPipeError:
        # The reader, for example `head`, has closed the pipe. Without this, Python would print an
        # error when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stop(run: Run) -> None:
    """Stop a run with a checkpoint after its current step, and cancel its pending jobs."""
    from launch.status import find_run_folder
    from launch.stop import stop_run

    typer.echo(stop_run(find_run_folder(run)))


def runs(
    roots: Annotated[
        list[str] | None,
        typer.Argument(help="Folders to search, three levels deep. Default: runs."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs in some folders, most recently changed first."""
    from launch.runs import format_table, list_runs

    roots = roots or ["runs"]
    for root in roots:
        if not Path(root).is_dir():
            raise UserError(f"ROOTS: no folder '{root}'")
    statuses = list_runs(roots)
    if as_json:
        typer.echo(json.dumps([status.as_dict() for status in statuses], indent=1))
    else:
        typer.echo(format_table(statuses))


def add_to(app: typer.Typer) -> None:
    """Add the commands to `llada`."""
    app.add_typer(launch_app, name="launch")
    for command in (status, logs, stop, runs):
        app.command()(command)

"""The commands around a run on a cluster: `llada launch`, `status`, `logs`, `stop`, `runs`. Thin,
and quick to import.
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


class _Launch(TyperGroup):
    """`llada launch CONFIG` is `llada launch run CONFIG`: what is no command's name is a config."""

    default_command = "run"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [self.default_command, *args]
        return list(super().parse_args(ctx, args))


launch_app = typer.Typer(
    cls=_Launch,
    no_args_is_help=True,
    help=(
        "Submit a run to Slurm, or start it on this machine: `llada launch CONFIG`, which is short"
        " for `llada launch run CONFIG`."
    ),
)

Cluster = Annotated[str | None, typer.Option(help="Profile of the cluster, a YAML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="key.sub=value of the profile, as in --set time=02:00:00; repeat it."
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Check everything, print the plan and the batch script, submit nothing."
    ),
]
After = Annotated[
    str | None, typer.Option(help="Start only when the job with this id has ended well.")
]
Run = Annotated[str, typer.Argument(help="Folder of the run.")]


@launch_app.command("run")
def run(
    config: Annotated[
        str,
        typer.Argument(
            help="YAML file of the run; its task says whether it is pretraining or fine-tuning."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value, as in train.steps=100.")
    ] = None,
    cluster: Cluster = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="GPUs of a node, each with a rank; on a cluster without GPUs: ranks of a node.",
        ),
    ] = None,
    set: Settings = None,
    dry_run: DryRun = False,
    local: Annotated[
        bool, typer.Option("--local", help="On this machine, in the foreground, without Slurm.")
    ] = False,
    chain: Annotated[
        int,
        typer.Option(
            min=1,
            help=(
                "Submit so many jobs that follow each other, for a site where jobs cannot requeue"
                " themselves."
            ),
        ),
    ] = 1,
    then: Annotated[
        str | None,
        typer.Option(help="convert: a job that writes RUN/hf when the run has finished."),
    ] = None,
    after: After = None,
    allow_changed: Annotated[
        bool,
        typer.Option("--allow-changed", help="Resume although settings or data changed; recorded."),
    ] = False,
    rewind: Annotated[
        int | None, typer.Option(min=0, help="Go back to the checkpoint after so many steps first.")
    ] = None,
) -> None:
    """Submit the run of CONFIG, or start it on this machine with --local."""
    from launch.submit.launch import LaunchOptions, launch_run

    options = LaunchOptions(
        nodes, gpus_per_node, dry_run, local, chain, then, after, allow_changed, rewind
    )
    raise typer.Exit(launch_run(config, overrides, _profile(cluster, set, local), options))


_PASS_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}


def _launch_data(
    command: str,
    context: typer.Context,
    tasks: int,
    cluster: str | None,
    settings: list[str] | None,
    dry: bool,
    after: str | None,
) -> None:
    from launch.submit.launch import launch_data

    profile = _profile(cluster, settings, False)
    assert profile is not None
    launch_data(command, list(context.args), profile, tasks, dry, after)


Tasks = Annotated[int, typer.Option(min=1, help="Tasks of the job array.")]


@launch_app.command("data-prepare", context_settings=_PASS_ON)
def data_prepare(
    context: typer.Context,
    tasks: Tasks,
    cluster: Cluster = None,
    set: Settings = None,
    dry_run: DryRun = False,
    after: After = None,
) -> None:
    """`llada data prepare` as a job array: all its options, and --tasks."""
    _launch_data("prepare", context, tasks, cluster, set, dry_run, after)


@launch_app.command("data-prepare-sft", context_settings=_PASS_ON)
def data_prepare_sft(
    context: typer.Context,
    tasks: Tasks,
    cluster: Cluster = None,
    set: Settings = None,
    dry_run: DryRun = False,
    after: After = None,
) -> None:
    """`llada data prepare-sft` as a job array: all its options, and --tasks."""
    _launch_data("prepare-sft", context, tasks, cluster, set, dry_run, after)


def _profile(cluster: str | None, settings: list[str] | None, local: bool) -> ClusterProfile | None:
    from launch.profile import load_profile

    if local:
        if cluster is not None or settings:
            raise UserError("--local: this machine has no profile; leave out --cluster and --set")
        return None
    if cluster is None:
        raise UserError(
            "--cluster: missing; name the profile of your cluster (configs/clusters has two to"
            " start from), or use --local"
        )
    return load_profile(cluster, settings)


def status(
    run: Run, as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False
) -> None:
    """State, progress and last error of a run; why it is pending."""
    from launch import status as watch

    found = watch.status(watch.state_folder(run))
    typer.echo(json.dumps(found.as_dict(), indent=1) if as_json else str(found))


def logs(
    run: Run,
    rank: Annotated[int, typer.Option(min=0, help="Whose log.")] = 0,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Of which start of the run; the latest if left out.")
    ] = None,
    task: Annotated[
        int | None, typer.Option(min=0, help="Of data preparation: of which task.")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Go on with what is added, through restarts, until the run ends."
        ),
    ] = False,
) -> None:
    """The log of a rank."""
    from launch import status as watch

    try:
        watch.print_bytes(watch.logs(watch.state_folder(run), rank, attempt, task, follow))
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stop(run: Run) -> None:
    """End a run with a checkpoint after its step, and cancel what of it waits in the queue."""
    from launch import status as watch

    typer.echo(watch.stop(watch.state_folder(run)))


def runs(
    roots: Annotated[
        list[str] | None,
        typer.Argument(help="Folders to look in, three levels deep; runs if left out."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As a JSON list.")] = False,
) -> None:
    """All runs below some folders, the latest changed first."""
    from launch import status as watch

    missing = [root for root in roots or ["runs"] if not Path(root).is_dir()]
    if missing:
        raise UserError(f"ROOTS: no folder '{missing[0]}'")
    found = watch.runs(roots or ["runs"])
    typer.echo(
        json.dumps([row.as_dict() for row in found], indent=1) if as_json else watch.table(found)
    )


def add_to(app: typer.Typer) -> None:
    """Add the commands to `llada`."""
    app.add_typer(launch_app, name="launch")
    for command in (status, logs, stop, runs):
        app.command()(command)

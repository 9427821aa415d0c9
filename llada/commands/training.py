"""The commands around a run: `pretrain`, `sft`, `config`, `compare`, `data step`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llada.commands.common import Config, Overrides, slow_imports
from llada.torchrun import explain_exit

AllowChanged = Annotated[
    bool,
    typer.Option(
        help="Resume even if settings, data or versions have changed; the change is recorded."
    ),
]
Rewind = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Go back to the checkpoint of step N; lr=RATE sets the learning rate from there on.",
    ),
]


def pretrain(
    config: Config,
    overrides: Overrides = None,
    allow_changed: AllowChanged = False,
    rewind: Rewind = None,
) -> None:
    """Pretrain a model, on one process or as a rank of torchrun or srun.

    If the run has checkpoints, continues from the latest one.
    """
    _train("pretrain", config, overrides, allow_changed, rewind)


def sft(
    config: Config,
    overrides: Overrides = None,
    allow_changed: AllowChanged = False,
    rewind: Rewind = None,
) -> None:
    """Fine-tune a model on conversations, on one process or as a rank of torchrun or srun.

    If the run has checkpoints, continues from the latest one.
    """
    _train("sft", config, overrides, allow_changed, rewind)


def _train(
    task: Literal["pretrain", "sft"],
    config: str,
    overrides: list[str] | None,
    allow_changed: bool,
    rewind: int | None,
) -> None:
    from llada.training.signals import StopRequest

    # Before the slow imports: a signal that arrives during them must stop the run cleanly too.
    stop = StopRequest().install()
    from llada.training.configure import load_config

    # A mistake in the config is reported before torch is imported.
    resolved = load_config(config, overrides, task=task, rewind=rewind)
    with slow_imports():
        from llada.training.loop import train

    code = train(resolved, stop, allow_changed, rewind)
    stop.close()
    if code:
        explain_exit(
            "not finished: stopped with a checkpoint; run the same command again to continue"
        )
    raise typer.Exit(code)


def show_config(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved config, and what the run will need.

    Prints every setting with defaults and overrides applied, then parameters, FLOPs, memory and
    checkpoint sizes as comments.
    """
    from llada.config import to_yaml
    from llada.planning.summary import summarize
    from llada.training.configure import load_config

    resolved = load_config(config, overrides)
    typer.echo(to_yaml(resolved), nl=False)
    for line in summarize(resolved):
        typer.echo(f"# {line}")


def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Run folders; each is compared with the first one.")
    ],
    step: Annotated[
        str | None,
        typer.Option(
            help=(
                "Validation to compare: a step, or `last` for the last one of each run. Default:"
                " the newest step that all runs have."
            )
        ),
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Compare this corpus only.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the validations of RUNS: paired differences, with confidence intervals."""
    import orjson

    from llada.evaluation import comparison, comparison_report

    opened = comparison.open_runs(runs, step, corpus)
    differences = comparison.compare(opened)
    if as_json:
        typer.echo(
            orjson.dumps(comparison_report.as_json(opened, differences), option=orjson.OPT_INDENT_2)
        )
    else:
        typer.echo(comparison_report.as_text(opened, differences))


def data_step(
    config: Config,
    step: Annotated[int, typer.Argument(min=1, help="Training step, counted from 1.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of samples to print.")] = 8,
) -> None:
    """Show which documents training step STEP reads, with t and masks; needs no model."""
    from llada.training.configure import load_config
    from llada.training.preview import describe_step

    typer.echo(describe_step(load_config(config, overrides), step, samples))


def add_to(app: typer.Typer) -> None:
    """Add the commands to `llada`."""
    app.command()(pretrain)
    app.command()(sft)
    app.command("config")(show_config)
    app.command()(compare)


def add_to_data(app: typer.Typer) -> None:
    """Add the command to `llada data`. It lives here because it needs a run's config."""
    app.command("step")(data_step)

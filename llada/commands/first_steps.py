"""The commands for a new machine: `llada demo` and `llada doctor`."""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    input: Annotated[
        list[str] | None,
        typer.Option(help="Text or code: file or folder. Default: the Python standard library."),
    ] = None,
    config: Annotated[
        str, typer.Option(help="Config for pretraining.")
    ] = "configs/demo/pretrain.yaml",
    sft_config: Annotated[
        str, typer.Option(help="Config for fine-tuning.")
    ] = "configs/demo/sft.yaml",
    dir: Annotated[
        str | None,
        typer.Option(help="Output folder. Default: runs/demo, or runs/demo_smoke with --smoke."),
    ] = None,
    smoke: Annotated[
        bool, typer.Option(help="Run only a few steps, to check that every stage works.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option(help="Start over instead of continuing an earlier demo.")
    ] = False,
) -> None:
    """Train a small model end to end, from raw text to an exported model.

    Trains a tokenizer, prepares a corpus, pretrains, fine-tunes, exports to Hugging Face, and
    writes a report.
    """
    from llada.training.signals import StopRequest

    stop = StopRequest().install()  # before the slow imports, as for `llada pretrain`
    from llada.demo import run_demo

    if not dir and smoke:
        dir = "runs/demo_smoke"  # its own folder, so that no whole demo continues it
    elif not dir:
        dir = "runs/demo"
    code = run_demo(stop, input, (config, sft_config), dir, smoke, fresh)
    stop.close()
    raise typer.Exit(code)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine for training, and suggest a fix for each problem.

    Exits with 1 if a problem blocks training.
    """
    from llada.doctor import examine

    report = examine()
    if as_json:
        typer.echo(report.to_json())
    else:
        typer.echo(str(report))
    raise typer.Exit(report.code)


def add_to(app: typer.Typer) -> None:
    """Add the commands to `llada`."""
    app.command()(demo)
    app.command()(doctor)

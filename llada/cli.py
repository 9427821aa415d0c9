"""The `llada` command: thin; each command imports what it needs when it runs, so `llada --help` answers at once."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Annotated, Literal

import typer

from data_tools.cli import app as data_app
from llada.errors import RunError, UserError

Config = Annotated[str, typer.Argument(help="YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, as in train.steps=100.")]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Train masked diffusion language models.", pretty_exceptions_enable=False
)
app.add_typer(data_app, name="data", help="Tokenize, shard, inspect and verify corpora.")


AllowChanged = Annotated[bool, typer.Option(help="Resume although settings, data or versions changed; recorded.")]


@app.command()
def pretrain(config: Config, overrides: Overrides = None, allow_changed: AllowChanged = False) -> None:
    """Pretrain CONFIG: alone, or as each rank of torchrun or srun. Continues from the run's latest checkpoint."""
    _train("pretrain", config, overrides, allow_changed)


@app.command()
def sft(config: Config, overrides: Overrides = None, allow_changed: AllowChanged = False) -> None:
    """Fine-tune CONFIG on conversations: alone, or as each rank of torchrun or srun. Continues from the latest checkpoint."""
    _train("sft", config, overrides, allow_changed)


def _train(task: Literal["pretrain", "sft"], config: str, overrides: list[str] | None, allow_changed: bool) -> None:
    from llada.training.signals import StopRequest

    stop = StopRequest().install()  # before the slow imports
    from llada.config import load_config

    resolved = load_config(config, overrides, task=task)
    from llada.training.loop import train

    raise typer.Exit(train(resolved, stop, allow_changed))


@app.command("config")
def show_config(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved CONFIG: every setting, defaults and overrides applied."""
    from llada.config import load_config, to_yaml

    typer.echo(to_yaml(load_config(config, overrides)), nl=False)


@data_app.command("step")
def data_step(
    config: Config,
    step: Annotated[int, typer.Argument(min=1, help="Training step, from 1.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to print.")] = 8,
) -> None:
    """Print corpora, documents, t and masks of step STEP, without a model."""
    from llada.config import load_config
    from llada.training.preview import describe_step

    typer.echo(describe_step(load_config(config, overrides), step, samples))


@app.command()
def demo(
    input: Annotated[
        list[str] | None, typer.Option(help="Text or code, files or folders; the Python standard library if left out.")
    ] = None,
    config: Annotated[str, typer.Option(help="Config of the pretraining.")] = "configs/demo/pretrain.yaml",
    dir: Annotated[str | None, typer.Option(help="Where everything goes; runs/demo, or runs/demo_smoke with --smoke.")] = None,
    smoke: Annotated[bool, typer.Option(help="A few steps only, to see that every stage works.")] = False,
    fresh: Annotated[bool, typer.Option(help="Start over instead of going on with what is there.")] = False,
) -> None:
    """Real text to a trained model: tokenizer, corpus, pretraining, report."""
    from llada.training.signals import StopRequest

    stop = StopRequest().install()
    from llada.demo import run_demo

    raise typer.Exit(run_demo(stop, input, config, dir or ("runs/demo_smoke" if smoke else "runs/demo"), smoke, fresh))


def main() -> None:
    """Entry point. Users' mistakes: one line, exit 2. Failures: one last line, exit 1."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        # Megatron-Core and torch announce absent extras and coming renames, 20 lines a start; nothing a user could act on.
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\.")
    try:
        app(standalone_mode=True)
    except UserError as error:
        _leave(f"error: {error}", 2)
    except RunError as error:
        _leave(f"failed: {error}", 1)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except Exception as error:  # not foreseen: the traceback for us, and one clear last line for everyone
        traceback.print_exc()
        _leave(f"failed: {type(error).__name__}: {error}", 1)


def _leave(message: str, code: int) -> None:
    sys.stdout.flush()
    print(" ".join(message.split()), file=sys.stderr, flush=True)
    # Not sys.exit: other ranks may be stuck in a collective with this one, and their threads must not delay the end.
    os._exit(code)

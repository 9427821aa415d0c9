"""The `llada` command: the list of commands, and how a command ends.

The commands are in llada.commands, data_tools.cli and launch.cli. Importing them imports nothing
heavy, so `llada --help` answers at once.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from typing import Annotated, NoReturn

import typer

from data_tools.cli import app as data_app
from launch.cli import add_to as add_launch_commands
from llada import exits, failures
from llada.commands import convert, first_steps, sampling, training
from llada.errors import RunError, StepError, TryAgain, UserError, one_line
from llada.torchrun import explain_exit

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Train masked diffusion language models.",
    pretty_exceptions_enable=False,
)
# `llada --help` lists commands, then groups, each in this order.
app.add_typer(data_app, name="data", help="Prepare, inspect, verify and convert corpora.")
convert.add_to(app)
add_launch_commands(app)
training.add_to(app)
training.add_to_data(data_app)
sampling.add_to(app)
first_steps.add_to(app)


def _print_version(requested: bool) -> None:
    if requested:
        from llada import __version__

        typer.echo(f"llada {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Train masked diffusion language models."""


def main() -> None:
    """Entry point.

    Exit codes: 0 finished, 1 a failure, 2 a user error, 75 not finished (run the same command
    again), 130 interrupted. An error ends with one line on stderr.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal whose encoding lacks ± shows \xb1 instead of a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        # Megatron-Core and torch report missing extras and coming renames, 20 lines at each start
        # about which a user can do nothing.
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\.")
    try:
        app(standalone_mode=True)
    except UserError as error:
        _exit(f"error: {error}", exits.USER_ERROR)
    except RunError as error:
        if isinstance(error, StepError):
            failures.report("step", error.step)
        _exit(f"failed: {error}", exits.FAILED)
    except TryAgain as error:
        _exit(f"not finished: {error}", exits.RESTART)
    except KeyboardInterrupt:
        _exit("interrupted", exits.INTERRUPTED)
    except Exception as error:
        # A bug: the traceback is for developers, the last line for everyone.
        traceback.print_exc()
        if failures.is_lost_peer(error):
            failures.report("lost_peer")
        _exit(f"failed: {type(error).__name__}: {error}", exits.FAILED)


def _exit(message: str, code: int) -> NoReturn:
    """Print `message` as one line on stderr and end the process."""
    sys.stdout.flush()
    line = one_line(message)
    print(line, file=sys.stderr, flush=True)
    # torchrun shows the message of the first rank that ended. Of a failure that rank is not always
    # the cause, so only ends that all ranks share are explained.
    if code in (exits.USER_ERROR, exits.RESTART):
        explain_exit(line)
    # Not sys.exit: a thread of this rank may wait in a collective for the other ranks, and would
    # keep the process alive.
    os._exit(code)

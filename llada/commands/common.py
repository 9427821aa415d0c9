"""What several commands share: arguments, and how they import and end."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(help="YAML config of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to override, such as train.steps=100.")
]


@contextmanager
def slow_imports() -> Iterator[None]:
    """Import without garbage collection.

    What torch and Megatron-Core create while they are imported lives until the end, so the
    collector takes a quarter of the time and frees nothing. `gc.freeze` exempts it for good.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def clean_up_on_sigterm() -> None:
    """Treat SIGTERM, which schedulers and containers send, like Ctrl-C.

    The KeyboardInterrupt unwinds the stack, and what is half written is removed on the way.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)

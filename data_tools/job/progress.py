"""How far a command is: a bar on a terminal; of a preparation a line every half
minute elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

_EVERY = 30.0
"""Seconds between lines where there is no terminal."""


class Progress:
    """Counts bytes of text, tokens and what is left out.

    Args:
        stream: where it is shown; None: nowhere.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._total = self._text = self._tokens = self._left_out = 0
        self._started = self._shown = time.monotonic()
        self._what = "reading"
        self._bar: Any = None

    def begin(self, what: str, text_bytes: int) -> None:
        """A further pass over about that much text."""
        self._what, self._total = what, self._text + text_bytes

    def advance(self, text: int, tokens: int, left_out: int) -> None:
        """What was done since the last call."""
        self._text, self._tokens, self._left_out = (
            self._text + text,
            self._tokens + tokens,
            self._left_out + left_out,
        )
        self._show()

    def say(self, message: str) -> None:
        """Something to know while nothing advances."""
        if self._bar is not None:
            self._bar.console.print(message)
        elif self._stream is not None:
            print(message, file=self._stream, flush=True)

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self._text / seconds
        left = max(self._total - self._text, 0)
        ends = f"{_clock(left / rate)} to go, " if left and rate else ""
        return (
            f"{self._what}: {ends}{self._text / 1e6:,.0f} MB, {rate / 1e6:,.1f} MB/s,"
            f" {self._left_out:,} left out, {self._tokens:,} tokens, {self._tokens / seconds:,.0f}"
            " tokens/s"
        )

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=self._line(),
                total=self._total or None,
                completed=min(self._text, self._total),
            )
        elif self._stream is not None and time.monotonic() - self._shown >= _EVERY:
            self._shown = time.monotonic()
            print(self._line(), file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        if self._stream is not None and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            console = Console(file=self._stream)
            self._bar = Bar(
                BarColumn(10),
                TextColumn("{task.description}", table_column=Column(overflow="fold", ratio=1)),
                console=console,
            )
            self._task = self._bar.add_task("reading", total=None)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def progress_bar(wanted: bool, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function of the tokens done since its last call that moves a bar, or does nothing.

    Args:
        wanted: show it (stderr is a terminal).
        what: is done, in one word.
        total: tokens in all.
    """
    if not wanted:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as display:
        task = display.add_task(what, total=max(total, 1))
        yield lambda tokens: display.update(task, advance=tokens)

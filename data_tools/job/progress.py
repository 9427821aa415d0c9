"""Progress of a command: a bar on a terminal, or, for a preparation, a line every half minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from llada.formatting import clock_time

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts bytes of text, tokens and things left out, and shows them.

    Args:
        stream: stream on which progress is shown; None shows nothing.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._pass_name = "reading"
        # In bytes of text, over all passes up to the current one; 0 until the first pass.
        self._total_bytes = 0
        self._text_bytes = 0
        self._tokens = 0
        self._left_out = 0
        self._start_time = time.monotonic()
        self._last_line_time = self._start_time
        self._bar: Bar | None = None
        self._bar_task: TaskID | None = None

    def begin_pass(self, name: str, text_bytes: int) -> None:
        """Begin a pass over about `text_bytes` more bytes of text."""
        self._pass_name = name
        self._total_bytes = self._text_bytes + text_bytes

    def advance(self, text_bytes: int, tokens: int, left_out: int) -> None:
        """Add what was done since the last call."""
        self._text_bytes += text_bytes
        self._tokens += tokens
        self._left_out += left_out
        self._show()

    def log(self, message: str) -> None:
        """Show a line that stays."""
        if self._bar is not None:
            self._bar.console.print(message)
        elif self._stream is not None:
            print(message, file=self._stream, flush=True)

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._start_time, 1e-9)
        bytes_per_second = self._text_bytes / seconds
        remaining = max(self._total_bytes - self._text_bytes, 0)
        to_go = ""
        if remaining and bytes_per_second:
            to_go = f"{clock_time(remaining / bytes_per_second)} to go, "
        return (
            f"{self._pass_name}: {to_go}{self._text_bytes / 1e6:,.0f} MB,"
            f" {bytes_per_second / 1e6:,.1f} MB/s, {self._left_out:,} left out,"
            f" {self._tokens:,} tokens, {self._tokens / seconds:,.0f} tokens/s"
        )

    def _show(self) -> None:
        if self._bar is not None:
            assert self._bar_task is not None
            self._bar.update(
                self._bar_task,
                description=self._line(),
                total=self._total_bytes or None,
                # The sizes of units are estimates, so they may exceed the total.
                completed=min(self._text_bytes, self._total_bytes),
            )
        elif self._stream is not None:
            now = time.monotonic()
            if now - self._last_line_time >= _SECONDS_BETWEEN_LINES:
                self._last_line_time = now
                print(self._line(), file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        if self._stream is not None and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            # The line of numbers is long, so the bar is short and the text may wrap.
            text_column = Column(overflow="fold", ratio=1)
            self._bar = Bar(
                BarColumn(10),
                TextColumn("{task.description}", table_column=text_column),
                console=Console(file=self._stream),
            )
            self._bar_task = self._bar.add_task("reading", total=None)
            self._bar.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress_bar(shown: bool, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while the block runs.

    Args:
        shown: whether to show it.
        description: verb that says what is being done, such as "merging".
        total: number of tokens in all.

    Yields:
        A function to call with the number of tokens done since the last call.
    """
    if not shown:
        yield lambda tokens: None
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
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=max(total, 1))
        yield lambda tokens: bar.update(task, advance=tokens)

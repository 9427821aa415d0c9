"""Where the metrics of a run go besides metrics.jsonl: console, events, TensorBoard and W&B.

On rank 0 only.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llada import events
from llada.config import RunConfig, dump_config
from llada.config.sections import LoggingSection
from llada.evaluation.validation import loss_name
from llada.events import EventLog
from llada.files import write_atomically
from llada.formatting import clock_time
from llada.training.reporting.metrics import MetricsLine, finite, is_step

if TYPE_CHECKING:
    from rich.progress import Progress


class Sink(Protocol):
    """Takes the lines of metrics.jsonl."""

    def write(self, line: MetricsLine) -> None: ...

    def close(self) -> None: ...


class StepEvents:
    """Steps in events.jsonl: the first of every start, then as often as lines on the console.

    Args:
        log: the run's event log.
        total: number of steps of the run.
        section: how often.
    """

    def __init__(self, log: EventLog, total: int, section: LoggingSection) -> None:
        self._log = log
        self._total = total
        self._every = section.every
        self._is_first = True

    def write(self, line: MetricsLine) -> None:
        if not is_step(line):
            return
        # The first step of every start is logged: it shows that the run computes again.
        step = line["step"]
        if self._is_first or step % self._every == 0 or step == self._total:
            self._log.write(
                "step",
                step=step,
                loss=finite(line["loss"]),
                tokens_per_second=finite(line["tokens_per_second"]),
                steps=self._total,
            )
            self._is_first = False

    def close(self) -> None:
        """Nothing is kept open."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, line: MetricsLine) -> None:
        for key, value in _scalars(line):
            self._writer.add_scalar(key, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run, offline unless an API key is configured.

    RUN/wandb_id keeps its id, so a restart continues the same W&B run.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        import wandb

        id_file = folder / "wandb_id"
        run_id = uuid.uuid4().hex[:8]
        if id_file.exists():
            run_id = id_file.read_text().strip()
        # Written before W&B starts: if this process dies in between, the next one continues the
        # same run.
        write_atomically(id_file, run_id)
        default_mode = "offline"
        if wandb.api.api_key:
            default_mode = "online"
        mode: Any = os.environ.get("WANDB_MODE") or default_mode
        self._run = wandb.init(
            project=config.logging.wandb_project,
            id=run_id,
            resume="allow",
            dir=str(folder),
            name=folder.name,
            config=dump_config(config),
            mode=mode,
        )
        self._run.summary.update(events.restarts(events.read(folder)))

    def write(self, line: MetricsLine) -> None:
        self._run.log(dict(_scalars(line)), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def _scalars(line: MetricsLine, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Flatten a line into named numbers: {"corpora": {"wiki": {"x": 1}}} gives corpora/wiki/x."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            yield prefix + key, value


class Console:
    """A live progress line on a terminal, else a line every few steps.

    Args:
        total: number of steps of the run.
        done: number of steps done before this start.
        section: how often to print where there is no terminal.
    """

    def __init__(self, total: int, done: int, section: LoggingSection) -> None:
        self._total = total
        self._every = section.every
        self._nelbo = ""
        self._progress: Progress | None = None
        if sys.stdout.isatty():
            self._start_progress(done)

    def _start_progress(self, done: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("", total=self._total, completed=done)
        self._progress.start()

    def write(self, line: MetricsLine) -> None:
        if not is_step(line):
            # The lines of the next steps show the loss of a validation.
            if "nelbo_per_token" in line:
                self._nelbo = f" | {loss_name(line)} {line['nelbo_per_token']:.3f}"
            return
        step = line["step"]
        speed = f"{line['tokens_per_second']:,.0f} tokens/s | MFU {100 * line['mfu']:.0f} %"
        text = f"loss {line['loss']:.4f}{self._nelbo} | {speed}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        elif step % self._every == 0 or step == self._total:
            eta = clock_time((self._total - step) * line["seconds"])
            print(
                f"step {step}/{self._total} | {text} | lr {line['lr']:.2e} | ETA {eta}", flush=True
            )

    def print_above(self, text: str) -> None:
        """Print a line, above the progress line where there is one."""
        # rich parses square brackets and colors numbers unless it is told not to.
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

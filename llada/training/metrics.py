"""Where the numbers of a run go: metrics.jsonl always, the console, and TensorBoard and W&B by
config. Main rank only.
"""

from __future__ import annotations

import json
import math
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from llada import events
from llada.config import RunConfig, Task, dump_config
from llada.config.sections import LoggingSection
from llada.evaluation import validation_files
from llada.events import EventLog
from llada.files import write_atomically

FILE = "metrics.jsonl"


class Sink(Protocol):
    """Something that takes one line of numbers."""

    def write(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl: one object a line, `step` first, in order of the steps.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115  # open for the whole run

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(line)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush to disk: a checkpoint must not be more durable than the lines before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity: they become strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; a torn last line is left out."""
    for raw in path.read_text(encoding="utf-8", errors="replace").splitlines():
        line = _parse(raw)
        if line is not None:
            yield line


def _parse(raw: str) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def cut(folder: Path, step: int) -> int:
    """Cut metrics.jsonl back to the lines up to `step`; the others, a torn one included, go to
    metrics.attempt-N.jsonl, and the files of later validations to validation.attempt-N.

    Returns:
        How many lines were cut.
    """
    path = folder / FILE
    attempt = 1 + sum(1 for _ in folder.glob("metrics.attempt-*.jsonl"))
    validation_files.supersede(folder, step, attempt)
    if not path.exists():
        return 0
    kept: list[str] = []
    dropped: list[str] = []
    for raw in path.read_text(encoding="utf-8", errors="replace").splitlines():
        line = _parse(raw)
        (kept if step and line is not None and line["step"] <= step else dropped).append(raw)
    if dropped:
        write_atomically(folder / f"metrics.attempt-{attempt}.jsonl", "\n".join(dropped) + "\n")
        write_atomically(path, "".join(raw + "\n" for raw in kept))
    return len(dropped)


class StepEvents:
    """Steps in events.jsonl: the first of every start, and then as often as lines on the console.

    Args:
        log: of the run.
        total: steps of the run.
        section: how often.
    """

    def __init__(self, log: EventLog, total: int, section: LoggingSection) -> None:
        self._log, self._total, self._every, self._first = log, total, section.every, True

    def write(self, line: dict[str, Any]) -> None:
        if "loss" in line and (
            self._first or line["step"] % self._every == 0 or line["step"] == self._total
        ):
            fields = {key: line[key] for key in ("step", "loss", "tokens_per_second")}
            self._log.write("step", **_finite(fields), steps=self._total)
            self._first = False

    def close(self) -> None:
        """Nothing is kept open."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, line: dict[str, Any]) -> None:
        for key, value in _scalars(line):
            self._writer.add_scalar(key, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run, offline unless a key is configured; its id is kept in RUN/wandb_id, so a restart
    goes on with the same run.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        import wandb

        stored = folder / "wandb_id"
        run_id = stored.read_text().strip() if stored.exists() else uuid.uuid4().hex[:8]
        write_atomically(stored, run_id)
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
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

    def write(self, line: dict[str, Any]) -> None:
        self._run.log(dict(_scalars(line)), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def _scalars(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in line.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            yield prefix + key, value


class Console:
    """A live progress line on a terminal, else a line every few steps.

    Args:
        total: steps of the run.
        done: steps done before.
        section: how often to print where there is no terminal.
    """

    def __init__(self, total: int, done: int, section: LoggingSection) -> None:
        self._total, self._every, self._nelbo = total, section.every, ""
        self._progress: Any = None
        if sys.stdout.isatty():
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
            self._task = self._progress.add_task("", total=total, completed=done)
            self._progress.start()

    def write(self, line: dict[str, Any]) -> None:
        if "loss" not in line:
            self._nelbo = (
                f" | NELBO {line['nelbo_per_token']:.3f}"
                if "nelbo_per_token" in line
                else self._nelbo
            )
            return
        speed = f"{line['tokens_per_second']:,.0f} tokens/s | MFU {100 * line['mfu']:.0f} %"
        text = f"loss {line['loss']:.4f}{self._nelbo} | {speed}"
        if self._progress:
            self._progress.update(self._task, completed=line["step"], description=text)
        elif line["step"] % self._every == 0 or line["step"] == self._total:
            eta = clock((self._total - line["step"]) * line["seconds"])
            print(
                f"step {line['step']}/{self._total} | {text} | lr {line['lr']:.2e} | ETA {eta}",
                flush=True,
            )

    def say(self, text: str) -> None:
        """Print a line above the progress line."""
        if self._progress:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def plot(folder: Path, task: Task = "pretrain") -> Path | None:
    """Draw the loss curve of a run to RUN/loss.png; None when there is nothing to draw.

    In fine-tuning the training loss is a mean over conversations, padding included, and the NELBO
    one over the tokens of replies: they are no common quantity and have axes of their own.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = list(read(folder / FILE))
    train = [(line["step"], line["loss"]) for line in lines if isinstance(line.get("loss"), float)]
    valid = [
        (line["step"], line["nelbo_per_token"], line.get("nelbo_per_token_se") or 0.0)
        for line in lines
        if isinstance(line.get("nelbo_per_token"), float)
    ]
    if not train:
        return None
    apart = task == "sft" and bool(valid)
    figure, panels = plt.subplots(
        1 + apart, sharex=True, squeeze=False, figsize=(8, 4.5 + 2.5 * apart), dpi=120
    )
    axes, below = panels[0, 0], panels[-1, 0]
    axes.plot(
        *zip(*train, strict=True),
        color="tab:blue",
        alpha=0.25,
        linewidth=0.8,
        label="training loss, each step",
    )
    axes.plot(
        *zip(*_smooth(train), strict=True), color="tab:blue", label="training loss, moving average"
    )
    if valid:
        steps, means, errors = zip(*valid, strict=True)
        below.errorbar(
            steps,
            means,
            errors,
            fmt="o-",
            capsize=2,
            color="tab:red",
            label="validation NELBO ± standard error",
        )
    axes.set_ylabel("nats per token, padded replies" if apart else "nats per token")
    below.set_ylabel("nats per token")
    below.set_xlabel("optimizer step")
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        panel.legend()
    target = folder / "loss.png"
    figure.savefig(target, bbox_inches="tight")
    plt.close(figure)
    return target


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    width = max(1, len(points) // 30)
    return [
        (points[i][0], sum(y for _, y in points[max(0, i - width + 1) : i + 1]) / min(width, i + 1))
        for i in range(len(points))
    ]

"""What a run reports: console, metrics, events, and the provenance in config.yaml.

Rank 0 has a `MainReporter`, the other ranks a `SilentReporter`. So the run says what happened on
every rank, without asking which one it is.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import orjson
import torch
import yaml

import llada
from llada import events, revision
from llada.config import PROVENANCE, RunConfig, dump_config
from llada.data.manifest import TRAIN
from llada.data.step_plan import StepPlan
from llada.data.training_data import TrainingData
from llada.engine.base import StepResult
from llada.engine.megatron import DTYPES
from llada.evaluation import validation_files
from llada.evaluation.validation import Validation, describe_validation
from llada.files import write_atomically
from llada.model.flops import Peak, step_flops
from llada.training.reporting import metrics
from llada.training.reporting.loss_curve import plot_loss_curve
from llada.training.reporting.mixture_lines import corpus_usage, weight_changes
from llada.training.reporting.sinks import Console, Sink, StepEvents, TensorBoard, WeightsAndBiases
from llada.training.run_folder import name_write_errors
from llada.training.starting.settings import arithmetic_versions
from llada.training.starting.start import Start
from llada.types import JsonObject


@dataclass(frozen=True)
class FinishedStep:
    """A step and what was measured around it.

    Attributes:
        step: 0-based.
        plan: its samples.
        result: its loss and gradient norm.
        tokens: trained on so far, this step included.
        learning_rate: the step's learning rate.
        seconds: seconds since the previous step was reported.
        memory_gb: largest memory use of this rank so far, GB.
        blocked_seconds: seconds for which a checkpoint blocked training since the previous step.
    """

    step: int
    plan: StepPlan
    result: StepResult
    tokens: int
    learning_rate: float
    seconds: float
    memory_gb: float
    blocked_seconds: float


@dataclass(frozen=True)
class Hardware:
    """What a run computes on.

    Attributes:
        device: this rank's device.
        world_size: number of ranks.
        threads: torch's CPU threads on this rank.
    """

    device: torch.device
    world_size: int
    threads: int


class Reporter(Protocol):
    """Takes what happens in a run. No method is collective."""

    def report_step(self, finished: FinishedStep) -> None:
        """Write the metrics of a step."""
        ...

    def report_validation(self, done: int, validation: Validation) -> None:
        """Write the metrics of the validation after `done` steps, and the losses behind them."""
        ...

    def sync(self) -> None:
        """Flush the metrics to disk: a checkpoint must not be more durable than those before it."""
        ...

    def log_event(self, event: str, **fields: object) -> None:
        """Append an event to events.jsonl."""
        ...

    def print_main(self, text: str) -> None:
        """Print a line on rank 0."""
        ...

    def refresh_peak(self) -> None:
        """Measure the device's peak again, where it is a measured one."""
        ...

    def report_end(self) -> None:
        """Draw the loss curve and print where everything is."""
        ...

    def close(self) -> None:
        """Close what is open; everything is closed even where one part fails."""
        ...


class SilentReporter:
    """The reporter of ranks other than 0: does nothing."""

    def report_step(self, finished: FinishedStep) -> None:
        return

    def report_validation(self, done: int, validation: Validation) -> None:
        return

    def sync(self) -> None:
        return

    def log_event(self, event: str, **fields: object) -> None:
        return

    def print_main(self, text: str) -> None:
        return

    def refresh_peak(self) -> None:
        return

    def report_end(self) -> None:
        return

    def close(self) -> None:
        return


def log_lifecycle(reporter: Reporter, event: str, **fields: object) -> None:
    """Log that a run started, finished, stopped or failed, unless a launcher does.

    A run without a launcher has to say so itself. The launcher's supervisor knows more (why it
    failed, on which machine) and writes these events on its own.
    """
    if "LLADA_ATTEMPT" not in os.environ:
        reporter.log_event(event, **fields)


class MainReporter:
    """The reporter of rank 0.

    Creating one truncates metrics.jsonl to the steps of the checkpoint, writes config.yaml, opens
    every sink, and prints what the run starts from.

    Args:
        config: the run's config.
        data: the run's data.
        start: what the run starts from.
        hardware: the devices and ranks that it uses.
        validated: corpora that have a validation, by number.
    """

    def __init__(
        self,
        config: RunConfig,
        data: TrainingData,
        start: Start,
        hardware: Hardware,
        validated: list[int],
    ) -> None:
        self._config = config
        self._data = data
        self._start = start
        self._hardware = hardware
        self._folder = Path(config.run.dir)
        self._events = events.of_this_process(self._folder)
        # Before anything is appended: lines past the checkpoint belong to an attempt that was lost.
        num_cut = metrics.cut(self._folder, start.step)
        # Where the peak has to be measured, no step competes for the device yet.
        self._peak = Peak(hardware.device, DTYPES[config.precision])
        self._write_config()
        self._console = Console(config.train.steps, start.step, config.logging)
        self._json_lines = metrics.JsonLines(self._folder)
        self._sinks: list[Sink] = [
            self._json_lines,
            self._console,
            StepEvents(self._events, config.train.steps, config.logging),
        ]
        if config.logging.tensorboard:
            self._sinks.append(TensorBoard(self._folder))
        if config.logging.wandb:
            self._sinks.append(WeightsAndBiases(self._folder, config))
        self._print_start(num_cut)
        self._print_hardware()
        self._print_data(validated)
        self._list_too_long()

    # -- while the run goes on ---------------------------------------------------------------------

    def report_step(self, finished: FinishedStep) -> None:
        self._write(self._step_line(finished))

    def _step_line(self, finished: FinishedStep) -> metrics.MetricsLine:
        """Return the line of metrics.jsonl for a step."""
        config = self._config
        plan = finished.plan
        result = finished.result
        objective = self._data.objective
        work = objective.work(plan.attended, plan.groups)
        row_length = objective.input_length(config.data.sequence_length)
        flops = step_flops(config.model, work, row_length)
        mfu = self._peak.mfu(flops.actual / finished.seconds / self._hardware.world_size)
        # The order of the fields is that of the file.
        return {
            "step": finished.step + 1,
            "tokens": finished.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": finished.learning_rate,
            "skipped": not result.applied,
            "seconds": finished.seconds,
            "tokens_per_second": plan.tokens / finished.seconds,
            "mfu": mfu,
            "mfu_full_length": mfu * flops.full_length / flops.actual,
            "memory_gb": finished.memory_gb,
            "checkpoint_blocked_seconds": finished.blocked_seconds,
        }

    def report_validation(self, done: int, validation: Validation) -> None:
        line = {"step": done, **validation.line}
        # The losses first: a line in metrics.jsonl promises the file behind it.
        validation_files.write(self._folder, done, validation.corpora)
        self._write(line)
        self.print_main(f"validation after step {done}: {describe_validation(line)}")

    def sync(self) -> None:
        with name_write_errors(self._folder):
            self._json_lines.sync()

    def log_event(self, event: str, **fields: object) -> None:
        with name_write_errors(self._folder):
            self._events.write(event, **fields)

    def print_main(self, text: str) -> None:
        self._console.print_above(text)

    def refresh_peak(self) -> None:
        self._peak.refresh()

    def report_end(self) -> None:
        with name_write_errors(self._folder):
            picture = plot_loss_curve(self._folder, self._config.task)
        steps = self._config.train.steps
        text = f"finished {steps} steps: {self._folder}"
        if self._start.step >= steps:
            text = (
                f"nothing to do: {self._folder} is at step {self._start.step}, train.steps is"
                f" {steps}; raise it to continue"
            )
        if picture:
            text += f", curve {picture}"
        self.print_main(text)

    def close(self) -> None:
        with ExitStack() as last_first:
            for sink in reversed(self._sinks):
                last_first.callback(sink.close)

    def _write(self, line: metrics.MetricsLine) -> None:
        with name_write_errors(self._folder):
            for sink in self._sinks:
                sink.write(line)

    # -- at the start ------------------------------------------------------------------------------

    def _write_config(self) -> None:
        """Write RUN/config.yaml: the resolved config, and what else decides the run."""
        config = self._config
        path = self._folder / "config.yaml"
        # A run that has nothing left to do keeps the config it was finished with.
        if self._start.step >= config.train.steps and path.exists():
            return
        provenance: JsonObject = {
            "llada": llada.__version__,
            "git": revision.of_code(),
            **arithmetic_versions(config, self._hardware.threads),
            "lineage": self._start.lineage,
        }
        content = {**dump_config(config), PROVENANCE: provenance}
        write_atomically(path, yaml.safe_dump(content, sort_keys=False))

    def _print_start(self, num_cut: int) -> None:
        start = self._start
        for note in start.notes:
            self.print_main(note)
        if start.step:
            text = f"resumed from {start.folder} at step {start.step}"
            if num_cut:
                text += f"; {num_cut} later lines of metrics.jsonl set aside"
            self.print_main(text)
        elif start.folder:
            self.print_main(f"initialized from {start.folder} ({self._config.run.init_what})")

    def _print_hardware(self) -> None:
        hardware = self._hardware
        peak = f"{self._peak.flops / 1e12:.3g} TFLOP/s per rank ({self._peak.source})"
        self.print_main(
            f"peak {peak}; {hardware.world_size} ranks, {hardware.threads} threads each"
        )

    def _print_data(self, validated: list[int]) -> None:
        for i, reader in enumerate(self._data.readers[TRAIN]):
            text = f"{self._config.data.mixture[i].path}: {reader.summary()}"
            if i not in validated:
                text += "; no held-out text fits: training without validation"
            self.print_main(text)
        for line in (*weight_changes(self._data), *corpus_usage(self._data)):
            self.print_main(line)

    def _list_too_long(self) -> None:
        """Write RUN/too_long.jsonl: every conversation that no row can hold."""
        rows = []
        for split, readers in self._data.readers.items():
            for reader in readers:
                corpus = reader.corpus.folder.name
                rows += [{"corpus": corpus, "split": split, **row} for row in reader.too_long()]
        if rows:
            path = self._folder / "too_long.jsonl"
            write_atomically(path, "".join(orjson.dumps(row).decode() + "\n" for row in rows))
            self.print_main(f"all conversations that are too long are listed in {path}")

"""The training loop, and how a run starts, resumes and ends."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import orjson
import torch
import yaml

import llada
from llada import events, revision
from llada.checkpoint import format
from llada.checkpoint.saving import Saving
from llada.config import PROVENANCE, RunConfig, dump_config
from llada.data.base import TRAIN, StepPlan
from llada.data.loader import Loader, Prepared
from llada.data.sft import ReplyReader
from llada.data.tasks import open_data
from llada.engine.base import StepResult
from llada.engine.determinism import use_deterministic_algorithms
from llada.engine.layout import join_world, sample_offsets, world_from_environment
from llada.engine.megatron import DTYPES, MegatronEngine
from llada.files import read_files, write_atomically
from llada.model.flops import Peak, step_flops
from llada.planning.summary import checkpoint_volume
from llada.training import folder, metrics, validation_files
from llada.training.guard import Guard
from llada.training.schedule import Schedule
from llada.training.signals import StopRequest
from llada.training.start import Start, resolve_resume, versions
from llada.training.validation import Validator, describe
from llada.training.watchdog import Watchdog, record_collectives

FLIGHT_RECORDER = "flight_recorder"
FINISHED, STOPPED = 0, 75
"""Exit codes: done; checkpoint written, run me again."""


def train(
    config: RunConfig, stop: StopRequest, allow_changed: bool = False, rewind: int | None = None
) -> int:
    """Run `config` from its latest checkpoint, or from the start, to `train.steps`.

    Args:
        config: the run.
        stop: asked to stop when true; looked at after every step.
        allow_changed: resume although settings, data or versions changed; recorded in the lineage.
        rewind: go back to the checkpoint after so many steps; recorded in the lineage.

    Returns:
        FINISHED, or STOPPED after a signal.

    Raises:
        UserError: the config, the data or the checkpoint cannot be used.
        RunError: the run failed.
        TryAgain: asked to stop while another process held the run folder.
    """
    run = Run(config, stop, allow_changed, rewind)
    try:
        run.tell("started")
        code = _loop(run, stop)
        run.tell("finished" if code == FINISHED else "stopped")
    except BaseException as error:
        with suppress(Exception):  # what failed first is what the user has to know
            if isinstance(error, Exception):
                run.tell("failed", reason=str(error), failure=True)
        with suppress(Exception):
            run.close()
        raise
    run.close()
    return code


def _loop(run: Run, stop: StopRequest) -> int:
    config = run.config
    if run.starts_from_weights:
        run.validate(0)
    for step, plan, batches in run.batches():
        result = run.engine.train_step(
            batches, run.schedule.learning_rate(step), run.guard.limits(step)
        )
        run.record(step, plan, result)
        done = step + 1
        last = done == config.train.steps
        stopping, writing = run.engine.any_of(
            bool(stop), run.saving is not None and not run.saving.written()
        )
        if not writing:
            run.finish_save()
        if done % config.validation.every == 0 or last:
            run.validate(done)
        if done % config.checkpoint.every == 0 or last or stopping:
            run.save(done, wait=last or stopping)
        if stopping and not last:
            run.note("signal", step=done, signal=stop.signal)
            run.say(
                f"{stop.signal or 'another rank'}: stopped after step {done} with a checkpoint; run"
                " the same command again to continue"
            )
            return STOPPED
    run.finish()
    return FINISHED


class Run:
    """Everything a run needs, from its config: data, engine, schedule, where it stands, and where
    its numbers go.
    """

    def __init__(
        self,
        config: RunConfig,
        stop: StopRequest,
        allow_changed: bool = False,
        rewind: int | None = None,
    ) -> None:
        self.config = config
        self.folder = Path(config.run.dir)
        self.root = self.folder / "checkpoints"
        rank, size, _ = world_from_environment()
        config.check_world(size)
        record_collectives(self.folder / FLIGHT_RECORDER)
        if config.run.deterministic:
            use_deterministic_algorithms()
        join_world(config.run.hang_timeout)
        self.schedule = Schedule(config.schedule, config.tokens_per_step)
        if self.schedule.steps is not None and self.schedule.steps < config.train.steps:
            self.schedule.learning_rate(config.train.steps - 1)  # raises with the setting's name
        self.threads = _set_threads(config, size)
        self.data = open_data(config, verify=rank == 0)
        # Now, since the corpus may be gone by the time of a checkpoint.
        self.tokenizer_files = read_files(self.data.tokenizer_folder) if rank == 0 else {}
        self.held = folder.hold(self.folder, rank, lambda: bool(stop))
        try:
            # Only now: a process that held the folder until a moment ago may have written
            # checkpoints.
            self._prepare(
                resolve_resume(config, self.data, self.root, self.threads, allow_changed, rewind)
            )
        except BaseException:
            if self.held is not None:
                self.held.release()
            raise

    def _prepare(self, start: Start) -> None:
        """Build the engine, and all that needs one; collective."""
        config = self.config
        if torch.cuda.is_available() and self.held is not None:
            with folder.naming(self.folder):
                (self.folder / FLIGHT_RECORDER).mkdir(exist_ok=True)
        self.events = events.of_this_process(self.folder)
        self.engine = MegatronEngine(config, self.data.objective.token_loss)
        try:
            self._begin(start)
        except BaseException:
            self.engine.close()
            raise

    def _begin(self, start: Start) -> None:
        """Load what the run starts from, and open what it writes to; collective."""
        config = self.config
        self.place, self.device = self.engine.parallel_rank, self.engine.device
        self.lineage: list[dict[str, Any]] = start.lineage
        self.starts_from_weights = start.folder is not None and start.step == 0
        self.first, self.tokens = start.step, start.tokens
        start.load(self.engine)
        self.validator = Validator(self.data, self.place)
        self.validation = start.validation
        self.guard = Guard(config.train, start.recent)
        self._unread: tuple[int, StepPlan, StepResult] | None = None
        self.sinks: list[metrics.Sink] = []
        self.loader: Loader | None = None
        if start.aside:
            self.engine.any(False)  # every rank has looked at the folder
        if self.place.is_main:
            with folder.naming(self.folder):
                format.supersede(start.aside)
                self._open_sinks(start)
        self.watchdog = Watchdog(
            self.folder / "heartbeats",
            self.place.rank,
            self.place.world_size,
            config.run.hang_timeout,
        )
        self.saving: Saving | None = None
        self.blocked = 0.0
        self._time = time.perf_counter()

    # -- the steps ---------------------------------------------------------------------------------

    def batches(self) -> Loader:
        """(step, plan, micro-batches of this replica) for every step that is left."""
        self.loader = Loader(self.make_batches, self.first, self.config.train.steps)
        return self.loader

    def make_batches(self, step: int) -> Prepared:
        """The plan and this rank's part of a step's micro-batches (0-based); a pure function of
        config and data.
        """
        plan = self.data.plan(step)
        batch, place = self.config.batch, self.place
        own = sample_offsets(batch.global_, batch.micro, place.data_rank, place.data_size)
        return plan, [self.engine.prepare(self.data.batch(plan, offsets)) for offsets in own]

    def record(self, step: int, plan: StepPlan, result: StepResult) -> None:
        """Note one step (0-based) once its numbers are there; on a GPU that is while the next step
        computes.
        """
        self.settle()
        self._unread = step, plan, result
        if result.done():
            self.settle()

    def settle(self) -> None:
        """Note the step whose numbers were not there yet, and stop a run that has gone wrong."""
        if self._unread is None:
            return
        (step, plan, result), self._unread = self._unread, None
        now = time.perf_counter()
        seconds, self._time = now - self._time, now
        self.tokens += plan.tokens
        self.watchdog.advance(step + 1)
        if self.place.is_main:
            self._write(self._line(step, plan, result, seconds))
        self.blocked = 0.0
        first = step * self.config.batch.global_
        warning = self.guard.check(step, result, range(first, first + self.config.batch.global_))
        if warning:
            self.say(warning)

    def _line(
        self, step: int, plan: StepPlan, result: StepResult, seconds: float
    ) -> dict[str, Any]:
        """A step's line of metrics.jsonl."""
        config, own = self.config, plan.maskable > 0
        predicted = self.data.objective.expected_predictions(plan.maskable[own], plan.t[own])
        flops = step_flops(
            config.model, plan.counted.tolist(), predicted, config.data.sequence_length
        )
        rate = flops.actual / seconds / self.place.world_size
        mfu = self._peak.mfu(rate)
        return {
            "step": step + 1,
            "tokens": self.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": self.schedule.learning_rate(step),
            "skipped": not result.applied,
            "seconds": seconds,
            "tokens_per_second": plan.tokens / seconds,
            "mfu": mfu,
            "mfu_full_length": mfu * flops.full_length / flops.actual,
            "memory_gb": self.engine.peak_memory_gb(),
            "checkpoint_blocked_seconds": self.blocked,
        }

    def validate(self, done: int) -> None:
        """Measure the NELBO after `done` steps; collective."""
        self.settle()
        if self.validator.corpora:
            measured = self.validator(self.engine)
            line = self.validation = {"step": done, **measured.line}
            if self.place.is_main:
                validation_files.write(self.folder, done, measured.corpora)
            self._write(line)
            self.say(f"validation after step {done}: {describe(line)}")
        if self.place.is_main:
            self._peak.refresh()
        self.watchdog.advance(done)
        self._time = time.perf_counter()

    def save(self, done: int, wait: bool) -> None:
        """Start to write the checkpoint after `done` steps, and with `wait` or without
        checkpoint.asynchronous finish it; collective.
        """
        self.settle()
        self.finish_save()
        with folder.naming(self.folder):
            for sink in self.sinks:
                if isinstance(sink, metrics.JsonLines):
                    sink.sync()
        if done > self.first:  # else it is the one this run started from
            started = time.perf_counter()
            config = self.config
            state = format.State(
                step=done,
                samples=done * config.batch.global_,
                tokens=self.tokens,
                data=self.data.fingerprint,
                config=dump_config(config),
                versions=versions(config, self.threads),
                lineage=self.lineage,
                recent=self.guard.recent,
                validation=self.validation,
                tokenizer=self.data.manifest.tokenizer_fingerprint,
                ranks=self.place.world_size,
            )
            self.saving = Saving(
                self.root,
                state,
                self.tokenizer_files,
                checkpoint_volume(config).bytes_each,
                self.engine,
            )
            self.blocked += time.perf_counter() - started
        if wait or not self.config.checkpoint.asynchronous:
            self.finish_save()
        self._time = time.perf_counter()

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if any, and give it its
        name; collective.
        """
        if self.saving is None:
            return
        started = time.perf_counter()
        saving, self.saving = self.saving, None
        saving.finish()
        self.note("checkpoint", step=saving.step)
        if self.place.is_main:
            self._prune()
        self.watchdog.advance(saving.step)
        self.blocked += time.perf_counter() - started

    def _prune(self) -> None:
        section = self.config.checkpoint
        format.prune(self.root, section.keep_last, section.keep_every)

    def finish(self) -> None:
        """Draw the curve and say where everything is."""
        if self.place.is_main:
            # A run that was killed between its last checkpoint and the pruning after it still has
            # one too many.
            self._prune()
            with folder.naming(self.folder):
                picture = metrics.plot(self.folder, self.config.task)
            steps = self.config.train.steps
            said = f"finished {steps} steps: {self.folder}"
            if self.first >= steps:
                said = (
                    f"nothing to do: {self.folder} is at step {self.first}, train.steps is {steps};"
                    " a larger one trains on"
                )
            self.say(said + (f", curve {picture}" if picture else ""))

    # -- where its numbers go ----------------------------------------------------------------------

    def _open_sinks(self, start: Start) -> None:
        config = self.config
        cut = metrics.cut(self.folder, self.first)
        self._peak = Peak(self.device, DTYPES[config.precision])
        provenance = {
            "llada": llada.__version__,
            "git": revision.of_code(),
            **versions(config, self.threads),
            "lineage": self.lineage,
        }
        text = yaml.safe_dump({**dump_config(config), PROVENANCE: provenance}, sort_keys=False)
        if self.first < config.train.steps or not (self.folder / "config.yaml").exists():
            write_atomically(self.folder / "config.yaml", text)
        self.console = metrics.Console(config.train.steps, self.first, config.logging)
        self.sinks = [
            metrics.JsonLines(self.folder),
            self.console,
            metrics.StepEvents(self.events, config.train.steps, config.logging),
        ]
        if config.logging.tensorboard:
            self.sinks.append(metrics.TensorBoard(self.folder))
        if config.logging.wandb:
            self.sinks.append(metrics.WeightsAndBiases(self.folder, config))
        for note in start.notes:
            self.say(note)
        if self.first:
            self.say(
                f"resumed from {start.folder} at step {self.first}"
                + (f"; {cut} later lines of metrics.jsonl set aside" if cut else "")
            )
        elif start.folder:
            self.say(f"initialised from {start.folder} ({config.run.init_what})")
        peak = f"{self._peak.flops / 1e12:.3g} TFLOP/s per rank ({self._peak.source})"
        self.say(f"peak {peak}; {self.place.world_size} ranks, {self.threads} threads each")
        for i, reader in enumerate(self.data.readers[TRAIN]):
            without = (
                ""
                if i in self.validator.corpora
                else "; nothing held out that fits: trains without validation"
            )
            self.say(f"{config.data.mixture[i].path}: {reader.summary()}{without}")
        for line in (*self.data.weight_changes(), *self.data.use()):
            self.say(line)
        self._list_too_long()

    def _list_too_long(self) -> None:
        """RUN/too_long.jsonl: every conversation that no row can hold."""
        rows = [
            {"corpus": reader.corpus.folder.name, "split": split, **row}
            for split, readers in self.data.readers.items()
            for reader in readers
            if isinstance(reader, ReplyReader)
            for row in reader.too_long()
        ]
        if rows:
            path = self.folder / "too_long.jsonl"
            write_atomically(path, "".join(orjson.dumps(row).decode() + "\n" for row in rows))
            self.say(f"all conversations that are too long are listed in {path}")

    def _write(self, line: dict[str, Any]) -> None:
        with folder.naming(self.folder):
            for sink in self.sinks:
                sink.write(line)

    def note(self, event: str, **fields: Any) -> None:
        """Write an event once."""
        if self.place.is_main:
            with folder.naming(self.folder):
                self.events.write(event, **fields)

    def tell(self, event: str, **fields: Any) -> None:
        """Write once how a run without a launcher goes; with one, its supervisor knows more and
        writes it.
        """
        if "LLADA_ATTEMPT" not in os.environ:
            self.note(event, **fields)

    def say(self, text: str) -> None:
        """Print a line once."""
        if self.place.is_main:
            self.console.say(text)

    def close(self) -> None:
        """Stop the loader, close the sinks, let go of the folder; each of them even where another
        fails.
        """
        with folder.naming(self.folder), ExitStack() as last_first:
            if self.held is not None:
                last_first.callback(self.held.release)
            last_first.callback(self.engine.close)
            for sink in reversed(self.sinks):
                last_first.callback(sink.close)
            if self.loader is not None:
                last_first.callback(self.loader.close)
            last_first.callback(self.watchdog.close)


def _set_threads(config: RunConfig, world_size: int) -> int:
    """Fix torch's CPU threads, which decide the order of sums."""
    local = int(
        os.environ.get(
            "LOCAL_WORLD_SIZE",
            os.environ.get("SLURM_NTASKS_PER_NODE", "1" if world_size == 1 else str(world_size)),
        )
    )
    # The launcher, which may narrow the cores of a rank to those near its GPU, says how many it has
    # to itself.
    threads = (
        config.run.threads
        or int(os.environ.get("LLADA_THREADS", "0"))
        or max(1, len(os.sched_getaffinity(0)) // local)
    )
    torch.set_num_threads(threads)
    return threads

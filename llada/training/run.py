"""A training run: its data, engine and schedule, where it stands, and what each step does."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from llada.checkpoint.format import CheckpointState
from llada.checkpoint.retention import supersede_checkpoints
from llada.config import RunConfig, dump_config
from llada.data.loader import Loader, Prepared
from llada.data.step_plan import StepPlan
from llada.data.tasks import open_data
from llada.engine.base import StepResult
from llada.engine.determinism import use_deterministic_algorithms
from llada.engine.layout import join_world, sample_offsets
from llada.engine.megatron import MegatronEngine
from llada.evaluation.validation import Validator
from llada.files import read_files
from llada.process_rank import ProcessRank, world_from_environment
from llada.training.checkpoint_writer import CheckpointWriter
from llada.training.guard import Guard
from llada.training.hooks import Hook, HookList
from llada.training.profiler import Profiler
from llada.training.reporting.reporter import (
    FinishedStep,
    Hardware,
    MainReporter,
    Reporter,
    SilentReporter,
)
from llada.training.run_folder import hold_run_folder, name_write_errors
from llada.training.schedule import Schedule
from llada.training.signals import StopRequest
from llada.training.starting.resume import resolve_resume
from llada.training.starting.settings import arithmetic_versions
from llada.training.starting.start import Start
from llada.training.watchdog import Watchdog, record_collectives

FLIGHT_RECORDER = "flight_recorder"
"""Folder of a run in which NCCL's last operations are written when one hangs."""


class Run:
    """Everything a run needs, from its config. Creating one is collective.

    Args:
        config: the run.
        stop: ends the waiting for the run folder when true.
        allow_changed: resume although settings, data or versions changed.
        rewind: resume from the checkpoint after this many steps; None: from the latest.
        hooks: called besides the run's own.

    Attributes:
        config, folder: the run's config and its folder.
        data: what it reads.
        engine: the model and its optimizer.
        schedule: learning rate by step.
        guard: watches for spikes and divergence.
        validator: measures the NELBO of the held-out text.
        checkpoints: writes the checkpoints.
        reporter: the console, metrics.jsonl and other sinks.
        hooks: what is called after steps, saves and validations.
        threads: torch's CPU threads in this process.
        start_step: steps done before this start.
        starts_from_weights: the run starts at step 0 from weights that are not random.
        tokens: trained on so far.
        validation: the last validation line of metrics.jsonl; None: there is none.
    """

    def __init__(
        self,
        config: RunConfig,
        stop: StopRequest,
        allow_changed: bool = False,
        rewind: int | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.config = config
        self.folder = Path(config.run.dir)
        process = self._join_world()
        rank = process.rank
        self.schedule = Schedule(config.schedule, config.tokens_per_step)
        self.schedule.check_covers(config.train.steps)
        self.threads = _set_threads(config, process.local_world_size)
        self.data = open_data(config, verify=rank == 0)
        # Read now: the corpus may be gone by the time of a checkpoint.
        tokenizer_files: dict[str, bytes] = {}
        if rank == 0:
            tokenizer_files = read_files(self.data.tokenizer_folder)

        # Closes what was opened, the last first, also if the rest of this method fails.
        with ExitStack() as opened:
            held_folder = hold_run_folder(self.folder, rank, lambda: bool(stop))
            if held_folder is not None:
                opened.callback(held_folder.release)
            # Only once the folder is held: the process that held it until a moment ago may have
            # written checkpoints.
            start = self._resolve_start(allow_changed, rewind)
            if torch.cuda.is_available() and rank == 0:
                with name_write_errors(self.folder):
                    (self.folder / FLIGHT_RECORDER).mkdir(exist_ok=True)
            self.engine = MegatronEngine(config, self.data.objective.losses)
            opened.callback(self.engine.close)
            start.load(self.engine)
            self.checkpoints = CheckpointWriter(config, self.engine, tokenizer_files)
            self.validator = Validator(self.data, self.engine.parallel_rank)
            self.guard = Guard(config.train, start.recent)
            self.reporter = self._open_reporter(start)
            opened.callback(self.reporter.close)
            # Last: what comes before may take longer than the watchdog allows for a step.
            self.hooks = HookList([*self._own_hooks(), *hooks])
            opened.callback(self.hooks.on_end)
            self._opened = opened.pop_all()

        self.start_step = start.step
        self.starts_from_weights = start.folder is not None and start.step == 0
        self.tokens = start.tokens
        self.validation = start.validation
        self._lineage = start.lineage
        self._unreported: tuple[int, StepPlan, StepResult] | None = None
        self._blocked_seconds = 0.0
        self._reported_at = time.perf_counter()

    def _join_world(self) -> ProcessRank:
        """Meet the other ranks and return which of them this process is."""
        config = self.config
        process = world_from_environment()
        config.check_world(process.world_size)
        # Before the first process group, which reads what this sets.
        record_collectives(self.folder / FLIGHT_RECORDER)
        if config.run.deterministic:
            use_deterministic_algorithms()
        join_world(config.run.hang_timeout)
        return process

    def _resolve_start(self, allow_changed: bool, rewind: int | None) -> Start:
        return resolve_resume(
            self.config,
            self.data,
            self.folder / "checkpoints",
            self.threads,
            allow_changed,
            rewind,
        )

    def _open_reporter(self, start: Start) -> Reporter:
        parallel_rank = self.engine.parallel_rank
        if start.superseded:
            # No rank renames a checkpoint before every rank has read it.
            self.engine.barrier()
        if not parallel_rank.is_main:
            return SilentReporter()
        hardware = Hardware(self.engine.device, parallel_rank.world_size, self.threads)
        with name_write_errors(self.folder):
            supersede_checkpoints(start.superseded)
            return MainReporter(self.config, self.data, start, hardware, self.validator.corpora)

    def _own_hooks(self) -> list[Hook]:
        parallel_rank = self.engine.parallel_rank
        watchdog = Watchdog(
            self.folder / "heartbeats",
            parallel_rank.rank,
            parallel_rank.world_size,
            self.config.run.hang_timeout,
        )
        hooks: list[Hook] = [watchdog]
        profile_steps = self.config.logging.profile_steps
        if profile_steps and parallel_rank.is_main:
            hooks.append(Profiler(self.folder / "profile", profile_steps))
        return hooks

    # -- steps -------------------------------------------------------------------------------------

    def batches(self) -> Loader:
        """Return an iterable over (step, plan, micro-batches of this replica) of the steps left."""
        loader = Loader(self.make_batches, self.start_step, self.config.train.steps)
        self._opened.callback(loader.close)
        return loader

    def make_batches(self, step: int) -> Prepared:
        """Return the plan of a step (0-based) and this rank's part of its micro-batches.

        A pure function of config and data; the loader calls it in a thread of its own.
        """
        plan = self.data.plan(step)
        batch = self.config.batch
        parallel_rank = self.engine.parallel_rank
        offsets_of_batches = sample_offsets(
            batch.global_, batch.micro, parallel_rank.data_rank, parallel_rank.data_size
        )
        prepared = [
            self.engine.prepare(self.data.batch(plan, offsets)) for offsets in offsets_of_batches
        ]
        return plan, prepared

    def record(self, step: int, plan: StepPlan, result: StepResult) -> None:
        """Take the result of a step (0-based), to be reported once its numbers are there.

        On a GPU the host runs ahead: a step's numbers are there while the next one computes.
        """
        self.flush_step()  # the step before
        self._unreported = step, plan, result
        if result.done():
            self.flush_step()

    def flush_step(self) -> None:
        """Report the step that is not reported yet, if any.

        Raises:
            RunError: the run has gone wrong, see `Guard`.
        """
        if self._unreported is None:
            return
        step, plan, result = self._unreported
        self._unreported = None
        now = time.perf_counter()
        seconds = now - self._reported_at
        self._reported_at = now
        self.tokens += plan.tokens
        self.hooks.on_step(step + 1, result)
        self.reporter.report_step(
            FinishedStep(
                step=step,
                plan=plan,
                result=result,
                tokens=self.tokens,
                learning_rate=self.schedule.learning_rate(step),
                seconds=seconds,
                memory_gb=self.engine.peak_memory_gb(),
                blocked_seconds=self._blocked_seconds,
            )
        )
        self._blocked_seconds = 0.0
        batch_size = self.config.batch.global_
        samples = range(step * batch_size, (step + 1) * batch_size)
        warning = self.guard.check(step, result, samples)
        if warning:
            self.reporter.print_main(warning)

    def validate(self, done: int) -> None:
        """Measure the NELBO after `done` steps; collective."""
        self.flush_step()
        if self.validator.corpora:
            measured = self.validator(self.engine)
            self.validation = {"step": done, **measured.line}
            self.reporter.report_validation(done, measured)
        self.reporter.refresh_peak()
        self.hooks.on_validation(done)
        # The next step's seconds do not include this.
        self._reported_at = time.perf_counter()

    # -- checkpoints -------------------------------------------------------------------------------

    def save(self, done: int, wait: bool) -> None:
        """Start to write the checkpoint after `done` steps; collective.

        With `wait`, or without `checkpoint.asynchronous`, it is finished before this returns.
        """
        self.flush_step()
        # One save at a time: the one before must be complete.
        self.finish_save()
        self.reporter.sync()
        if done > self.start_step:  # else it is the checkpoint that this run started from
            started = time.perf_counter()
            self.checkpoints.start(self._state(done))
            self._blocked_seconds += time.perf_counter() - started
        if wait or not self.config.checkpoint.asynchronous:
            self.finish_save()
        self._reported_at = time.perf_counter()

    def _state(self, done: int) -> CheckpointState:
        config = self.config
        return CheckpointState(
            step=done,
            samples=done * config.batch.global_,
            tokens=self.tokens,
            data=self.data.fingerprint,
            config=dump_config(config),
            versions=arithmetic_versions(config, self.threads),
            lineage=self._lineage,
            recent=self.guard.recent,
            validation=self.validation,
            tokenizer=self.data.manifest.tokenizer_fingerprint,
            ranks=self.engine.parallel_rank.world_size,
        )

    def finish_save(self) -> None:
        """Wait for the checkpoint that is being written, if any, and complete it; collective."""
        started = time.perf_counter()
        step = self.checkpoints.finish()
        if step is None:
            return
        self.reporter.log_event("checkpoint", step=step)
        self.checkpoints.prune()
        self.hooks.on_save(step)
        self._blocked_seconds += time.perf_counter() - started

    # -- end ---------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Do what a run does after its last step."""
        # A run that was killed between its last checkpoint and the pruning still has one too many.
        self.checkpoints.prune()
        self.reporter.report_end()

    def close(self) -> None:
        """Stop the loader, end the hooks, close what is open and release the folder.

        Each of them is closed even if another fails.
        """
        with name_write_errors(self.folder):
            self._opened.close()


def _set_threads(config: RunConfig, ranks_on_machine: int) -> int:
    """Fix the number of torch's CPU threads, which decides the order of sums, and return it."""
    # LLADA_THREADS comes from the launcher. It may narrow the cores of a rank to those near its
    # GPU, so it knows better than a division of this machine's cores.
    threads = config.run.threads or int(os.environ.get("LLADA_THREADS", "0"))
    if not threads:
        threads = max(1, len(os.sched_getaffinity(0)) // ranks_on_machine)
    torch.set_num_threads(threads)
    return threads

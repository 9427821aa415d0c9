"""Profiles some steps of a run: a trace of CPU and GPU, for chrome://tracing or Perfetto."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from llada.engine.base import StepResult
from llada.training.hooks import Hook

SKIPPED_STEPS = 10
"""Steps of each start that are not profiled: in these, kernels are compiled and memory grows."""


class Profiler(Hook):
    """Traces steps of this process with torch.profiler.

    The trace is RUN/profile/step_NNNNNNNN.json, named for the last step in it. A run that ends
    while it is traced writes the steps it has; one that ends before that writes no trace.

    Args:
        folder: RUN/profile, created with the first trace.
        steps: number of steps to trace.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self._folder = folder
        self._steps = steps
        self._last_step = 0
        self._profile: torch.profiler.profile | None = None

    def on_start(self, done: int) -> None:
        self._last_step = done
        # The profiler itself slows the first step that it records, so that step is dropped.
        schedule = torch.profiler.schedule(
            wait=SKIPPED_STEPS - 1, warmup=1, active=self._steps, repeat=1
        )
        self._profile = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write)
        self._profile.start()

    def on_step(self, done: int, result: StepResult) -> None:
        self._last_step = done
        if self._profile is not None:
            self._profile.step()

    def on_end(self) -> None:
        # A run that fails early ends its hooks without having started them.
        if self._profile is not None:
            self._profile.stop()

    def _write(self, profile: torch.profiler.profile) -> None:
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"step_{self._last_step:08d}.json"
        partial = path.with_suffix(".partial")
        profile.export_chrome_trace(str(partial))
        os.replace(partial, path)

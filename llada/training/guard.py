"""Watches loss and gradient norm: names steps far above the recent ones, and stops a run that leaves out step after step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

from llada.engine.base import Limits, StepResult
from llada.errors import RunError
from llada.settings import TrainSection

_LAG = 2
"""Steps between a step and the last one its limits come from: a GPU reports a step's numbers while it computes the next."""


class Applied(NamedTuple):
    """A step that updated the weights: how many were done before it, its loss and gradient norm."""

    step: int
    loss: float
    grad_norm: float


class Guard:
    """The sigma rule over the last `train.spike_window` applied steps, and the count of steps left out in a row.

    Args:
        section: the run's settings.
        recent: applied steps before this start, oldest first, as `recent` gave them when the checkpoint was written.
    """

    def __init__(self, section: TrainSection, recent: Iterable[Applied] = ()) -> None:
        self._section = section
        self._recent = [Applied(*entry) for entry in recent]
        self._left_out = 0

    @property
    def recent(self) -> list[Applied]:
        """What a checkpoint must hold so that a resumed run has the same limits."""
        return list(self._recent)

    def spike_limits(self, step: int) -> Limits:
        """Mean + sigma standard deviations of loss and norm before `step` (0-based); infinite until the window is full.

        A function of the results of steps up to `step` - 2 alone, whenever they were read.
        """
        sigma, window = self._section.spike_sigma, self._section.spike_window
        known = [entry for entry in self._recent if entry.step <= step - _LAG][-window:]
        if sigma is None or len(known) < window:
            return Limits()

        def bound(values: list[float]) -> float:
            return statistics.fmean(values) + sigma * statistics.pstdev(values)

        return Limits(bound([entry.loss for entry in known]), bound([entry.grad_norm for entry in known]))

    def limits(self, step: int) -> Limits:
        """What the engine must leave out at `step` (0-based) besides what is not finite."""
        return self.spike_limits(step) if self._section.skip_spikes else Limits()

    def check(self, step: int, result: StepResult, samples: range) -> str | None:
        """Take note of a step, in order.

        Args:
            step: 0-based.
            result: of the step.
            samples: global sample indices of the step, named in the message.

        Returns:
            A line about a spike or a step that was left out; None: nothing to say.

        Raises:
            RunError: more than train.max_skipped steps in a row were left out.
        """
        limits = self.spike_limits(step)
        what = _above(result, limits) or (None if result.applied else "left out because of another rank's numbers")
        if result.applied:
            self._left_out = 0
            self._recent = [*self._recent, Applied(step, result.loss, result.grad_norm)][-(self._section.spike_window + _LAG) :]
        else:
            self._left_out += 1
        if what is None:
            return None
        named = f"step {step + 1}: {what}; samples {samples.start} to {samples.stop - 1} of the data order"
        if self._left_out > self._section.max_skipped:
            raise RunError(f"{named}; {self._left_out} steps in a row updated nothing (train.max_skipped: {self._section.max_skipped})")
        return named + ("" if result.applied else "; the step updated nothing")


def _above(result: StepResult, limits: Limits) -> str | None:
    """What is wrong with a step's numbers."""
    for name, value, limit in (("loss", result.loss, limits.loss), ("gradient norm", result.grad_norm, limits.grad_norm)):
        if not math.isfinite(value):
            return f"loss {result.loss:g} and gradient norm {result.grad_norm:g} are not finite"
        if value > limit:
            return f"{name} {value:.4g} is a spike, above {limit:.4g} (train.spike_sigma)"
    return None

"""Watches loss and gradient norm.

Reports steps far above the recent level, skips them if the config says so, and stops a run that
skips step after step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from llada.arithmetic import ceil_div
from llada.config.sections import TrainSection
from llada.engine.base import Limits, StepResult
from llada.errors import StepError

_LAG = 2
"""Distance in steps between a step and the latest one that its limits may use.

A GPU reports a step's numbers while it computes the next one. So the limits of a step must not
depend on the step just before it, or they would depend on when its numbers were read.
"""

_TAIL_START = 1.2816
"""The 90th percentile of the standard normal distribution: where its upper tenth starts."""
_TAIL_MEDIAN = 0.3633
"""The 95th percentile minus the 90th: how far above its start the median of that tenth is."""


class Applied(NamedTuple):
    """A step that updated the weights.

    Attributes:
        step: 0-based.
        loss, grad_norm: the step's loss and gradient norm.
    """

    step: int
    loss: float
    grad_norm: float


class Guard:
    """The spike rule over the last `train.spike_window` applied steps, and a count of skipped ones.

    Args:
        section: the run's settings.
        recent: applied steps before this start, oldest first, as `recent` gave them when the
            checkpoint was written.
    """

    def __init__(self, section: TrainSection, recent: Iterable[Applied] = ()) -> None:
        self._section = section
        self._recent = [Applied(*entry) for entry in recent]
        self._skipped_in_a_row = 0

    @property
    def recent(self) -> list[Applied]:
        """What a checkpoint must contain so that a resumed run has the same limits."""
        return list(self._recent)

    def spike_limits(self, step: int) -> Limits:
        """Return what loss and norm of `step` (0-based) must exceed to be a spike.

        Infinite until the window is full; see `upper_limit`. A function of the results of steps up
        to `step` - 2 alone, whenever they were read.
        """
        section = self._section
        known = [entry for entry in self._recent if entry.step <= step - _LAG]
        known = known[-section.spike_window :]
        if section.spike_sigma is None or len(known) < section.spike_window:
            return Limits()
        losses = [entry.loss for entry in known]
        norms = [entry.grad_norm for entry in known]
        return Limits(
            upper_limit(losses, section.spike_sigma, section.spike_loss_factor),
            upper_limit(norms, section.spike_sigma, section.spike_norm_factor),
        )

    def limits(self, step: int) -> Limits:
        """Return the limits above which the engine must skip `step` (0-based).

        It skips a step whose numbers are not finite in any case.
        """
        if not self._section.skip_spikes:
            return Limits()
        return self.spike_limits(step)

    def check(self, step: int, result: StepResult, samples: range) -> str | None:
        """Take the result of a step; steps come in order.

        Args:
            step: 0-based.
            result: the step's result.
            samples: global sample indices of the step, named in the message.

        Returns:
            A line about a spike or a skipped step; None if there is nothing to say.

        Raises:
            StepError: more than train.max_skipped steps in a row were skipped.
        """
        problem = _find_problem(result, self.spike_limits(step))
        if result.applied:
            self._skipped_in_a_row = 0
            self._recent.append(Applied(step, result.loss, result.grad_norm))
            self._recent = self._recent[-(self._section.spike_window + _LAG) :]
        else:
            self._skipped_in_a_row += 1
            problem = problem or "left out because of another rank's numbers"
        if problem is None:
            return None
        message = (
            f"step {step + 1}: {problem}; samples {samples.start} to {samples.stop - 1} of the data"
            " order"
        )
        if self._skipped_in_a_row > self._section.max_skipped:
            raise StepError(
                f"{message}; {self._skipped_in_a_row} steps in a row updated nothing"
                f" (train.max_skipped: {self._section.max_skipped})",
                step=step + 1,
            )
        if not result.applied:
            message += "; the step updated nothing"
        return message


def upper_limit(values: Sequence[float], sigma: float, factor: float) -> float:
    """Return what the next value must exceed to be a spike.

    A spike is far out in the tail of the recent values, and far above their level. Losses and
    gradient norms are positive, noisy by a factor, and skewed: a healthy run has single norms of
    twice the usual. So the rule works on logarithms, and takes the width of the upper tail from the
    largest tenth of the window itself, not from a mean and standard deviation. For normal
    logarithms the limit is the level plus `sigma` standard deviations; a heavier tail moves it up.
    Only the median of that tenth counts, so a few past spikes in the window do not hide the next.

    The level follows the window's trend where it rises (warm-up), and is that of the newer half
    where it falls.

    Args:
        values: losses or norms of the applied steps of the window, oldest first.
        sigma: standard deviations of a normal distribution.
        factor: multiple of the level; no value below that is a spike.
    """
    logs = np.log(np.maximum(values, np.finfo(np.float64).tiny))
    half = len(logs) // 2

    # The trend: from the median of the older half to that of the newer one.
    slope = float(np.median(logs[-half:]) - np.median(logs[:half])) / (len(logs) - half)
    # Each value where the trend would have it at the newest step.
    carried = logs - slope * np.arange(1 - len(logs), 1)
    level = float(np.median(carried))

    # The upper tail: where its tenth starts, and the standard deviation that its median implies. A
    # window whose largest values are close together by chance does not lower the limit: the
    # deviation is at least the one that the start of the tail implies.
    ordered = np.sort(carried) - level
    tail_size = ceil_div(len(ordered), 10)
    tail = ordered[-tail_size:]
    start = float(ordered[-tail_size - 1])
    deviation = max(float(np.median(tail) - start) / _TAIL_MEDIAN, start / _TAIL_START)
    height = max(start + (sigma - _TAIL_START) * deviation, math.log(factor))

    # A rising trend is continued to the step in question. A falling one is not: the level is taken
    # from the middle of the newer half, a quarter of a window ago.
    if slope > 0:
        drift = slope * _LAG
    else:
        drift = slope * (-half / 2)
    return math.exp(min(level + drift + height, 700.0))  # exp(710) overflows


def _find_problem(result: StepResult, limits: Limits) -> str | None:
    """Describe what is wrong with a step's numbers, if anything is."""
    for name, value, limit in (
        ("loss", result.loss, limits.loss),
        ("gradient norm", result.grad_norm, limits.grad_norm),
    ):
        if not math.isfinite(value):
            return f"loss {result.loss:g} and gradient norm {result.grad_norm:g} are not finite"
        if value > limit:
            return f"{name} {value:.4g} is a spike, above {limit:.4g} (train.spike_sigma)"
    return None

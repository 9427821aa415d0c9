"""Watches loss and gradient norm: names steps far above the recent ones, and stops a run that
leaves out step after step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from llada.config.sections import TrainSection
from llada.engine.base import Limits, StepResult
from llada.errors import StepError

_LAG = 2
"""Steps between a step and the last one its limits come from: a GPU reports a step's numbers while
it computes the next.
"""

_TAIL_START = 1.2816
"""Of a normal distribution: the standard deviations above the median where its upper tenth starts.
"""
_TAIL_MEDIAN = 0.3633
"""Of a normal distribution: the standard deviations between that start and the median of its upper
tenth.
"""


class Applied(NamedTuple):
    """A step that updated the weights: how many were done before it, its loss and gradient norm."""

    step: int
    loss: float
    grad_norm: float


class Guard:
    """The spike rule over the last `train.spike_window` applied steps, and the count of steps left
    out in a row.

    Args:
        section: the run's settings.
        recent: applied steps before this start, oldest first, as `recent` gave them when the
            checkpoint was written.
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
        """What loss and norm of `step` (0-based) must exceed to be a spike, see `upper_limit`;
        infinite until the window is full.

        A function of the results of steps up to `step` - 2 alone, whenever they were read.
        """
        section = self._section
        known = [entry for entry in self._recent if entry.step <= step - _LAG][
            -section.spike_window :
        ]
        if section.spike_sigma is None or len(known) < section.spike_window:
            return Limits()
        return Limits(
            upper_limit(
                [entry.loss for entry in known], section.spike_sigma, section.spike_loss_factor
            ),
            upper_limit(
                [entry.grad_norm for entry in known], section.spike_sigma, section.spike_norm_factor
            ),
        )

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
            StepError: more than train.max_skipped steps in a row were left out.
        """
        limits = self.spike_limits(step)
        what = _above(result, limits) or (
            None if result.applied else "left out because of another rank's numbers"
        )
        if result.applied:
            self._left_out = 0
            self._recent = [*self._recent, Applied(step, result.loss, result.grad_norm)][
                -(self._section.spike_window + _LAG) :
            ]
        else:
            self._left_out += 1
        if what is None:
            return None
        named = (
            f"step {step + 1}: {what}; samples {samples.start} to {samples.stop - 1} of the data"
            " order"
        )
        if self._left_out > self._section.max_skipped:
            raise StepError(
                f"{named}; {self._left_out} steps in a row updated nothing (train.max_skipped:"
                f" {self._section.max_skipped})"
            )
        return named + ("" if result.applied else "; the step updated nothing")


def upper_limit(values: Sequence[float], sigma: float, factor: float) -> float:
    """What the next value must exceed to be a spike: far out in the tail of the recent values, and
    far above their level.

    Losses and gradient norms are positive, noisy by a factor, and skewed: a healthy run has single
    norms of twice the usual. So the rule works on logarithms, and takes the width of the upper tail
    from the largest tenth of the window itself, not from a mean and standard deviation. For normal
    logarithms the limit is the level plus `sigma` standard deviations; a heavier tail moves it up.
    Only the median of that tenth counts, so a few past spikes in the window do not hide the next.

    The level follows the window's trend where it rises (warm-up), and is that of the newer half
    where it falls.

    Args:
        values: of the applied steps of the window, oldest first.
        sigma: standard deviations of a normal distribution.
        factor: of the level; no value below it is a spike.
    """
    logs = np.log(np.maximum(values, np.finfo(np.float64).tiny))
    half = len(logs) // 2
    slope = float(np.median(logs[-half:]) - np.median(logs[:half])) / (len(logs) - half)
    # each value where the trend would have it at the newest step
    carried = logs - slope * np.arange(1 - len(logs), 1)
    level = float(np.median(carried))
    ordered = np.sort(carried) - level
    tail = ordered[-len(ordered) // 10 :]
    start = float(ordered[-len(tail) - 1])
    deviation = float(np.median(tail) - start) / _TAIL_MEDIAN
    ahead = slope * (_LAG if slope > 0 else -half / 2)
    return math.exp(
        min(level + ahead + max(start + (sigma - _TAIL_START) * deviation, math.log(factor)), 700.0)
    )


def _above(result: StepResult, limits: Limits) -> str | None:
    """What is wrong with a step's numbers."""
    for name, value, limit in (
        ("loss", result.loss, limits.loss),
        ("gradient norm", result.grad_norm, limits.grad_norm),
    ):
        if not math.isfinite(value):
            return f"loss {result.loss:g} and gradient norm {result.grad_norm:g} are not finite"
        if value > limit:
            return f"{name} {value:.4g} is a spike, above {limit:.4g} (train.spike_sigma)"
    return None

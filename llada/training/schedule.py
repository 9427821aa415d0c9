"""The learning rate: stages of absolute length, so extending a run changes nothing before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llada.arithmetic import ceil_div
from llada.config.sections import ScheduleSection
from llada.errors import UserError

_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 0.0,
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
}
"""Progress of a stage in (0, 1] -> how far the rate is from its start to its end."""


@dataclass(frozen=True)
class _LRStage:
    """A stage of the schedule.

    Attributes:
        shape: one of _SHAPES.
        start, end: learning rates.
        first: its first step, 0-based.
        steps: its length; None: it has no end.
    """

    shape: str
    start: float
    end: float
    first: int
    steps: int | None


class Schedule:
    """Learning rate of every step.

    Step k (1-based) of a stage of n steps has progress k / n: a linear warm-up of n steps reaches
    its end at step n, and the first step already learns. A warm-up of 4 steps to 1.0 has the rates
    0.25, 0.5, 0.75, 1.0.

    Args:
        section: the stages.
        tokens_per_step: turns lengths in tokens into steps, rounded up.
    """

    def __init__(self, section: ScheduleSection, tokens_per_step: int) -> None:
        self._rewinds = section.rewinds
        self._lr_stages: list[_LRStage] = []
        first = 0
        rate = 0.0  # at the end of the previous stage
        for stage in section.stages:
            steps = stage.steps
            if stage.tokens is not None:
                steps = ceil_div(stage.tokens, tokens_per_step)
            start = rate
            if stage.start is not None:
                start = stage.start
            rate = start
            if stage.end is not None:
                rate = stage.end
            self._lr_stages.append(_LRStage(stage.shape, start, rate, first, steps))
            first += steps or 0

    @property
    def steps(self) -> int | None:
        """Length of the whole schedule in steps; None: its last stage has no end."""
        last = self._lr_stages[-1]
        if last.steps is None or self._rewinds:
            return None
        return last.first + last.steps

    def check_covers(self, steps: int) -> None:
        """Check that each of the first `steps` steps has a learning rate.

        Raises:
            UserError: the schedule ends before that.
        """
        self.learning_rate(steps - 1)

    def learning_rate(self, step: int) -> float:
        """Return the rate of training step `step` (0-based).

        Raises:
            UserError: the step is past the schedule's end.
        """
        # A rewind with another learning rate replaces the stages from its step on.
        rates = [rewind.lr for rewind in self._rewinds if rewind.step <= step]
        if rates:
            return rates[-1]
        stage = next(stage for stage in reversed(self._lr_stages) if stage.first <= step)
        if stage.steps is None:
            return stage.start
        if step >= stage.first + stage.steps:
            raise UserError(
                f"schedule.stages: end after {self.steps} steps, step {step + 1} has no learning"
                " rate; add a stage or lower train.steps"
            )
        # At the last step of the stage the progress is 1.
        progress = (step - stage.first + 1) / stage.steps
        return stage.start + (stage.end - stage.start) * _SHAPES[stage.shape](progress)

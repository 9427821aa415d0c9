"""The learning rate: pieces of absolute length, so that extending a run changes nothing that came
before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llada.config.sections import ScheduleSection
from llada.errors import UserError

_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 0.0,
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
}


@dataclass(frozen=True)
class _LRStage:
    shape: str
    start: float
    end: float
    first: int
    steps: int | None


class Schedule:
    """Learning rate of every step.

    Step k (1-based) of a piece of n steps has progress k / n: a linear warm-up of n steps reaches
    its end at step n, and the first step already learns.

    Args:
        section: the pieces.
        tokens_per_step: turns lengths in tokens into steps, rounded up.
    """

    def __init__(self, section: ScheduleSection, tokens_per_step: int) -> None:
        self._rewinds = section.rewinds
        self._pieces: list[_LRStage] = []
        first, rate = 0, 0.0
        for stage in section.stages:
            steps = stage.steps if stage.tokens is None else -(-stage.tokens // tokens_per_step)
            start = rate if stage.start is None else stage.start
            rate = start if stage.end is None else stage.end
            self._pieces.append(_LRStage(stage.shape, start, rate, first, steps))
            first += steps or 0

    @property
    def steps(self) -> int | None:
        """Length of the whole schedule in steps; None: the last piece goes on without end."""
        last = self._pieces[-1]
        return None if last.steps is None or self._rewinds else last.first + last.steps

    def learning_rate(self, step: int) -> float:
        """Of training step `step` (0-based). Raises UserError past the schedule's end."""
        changed = [entry.lr for entry in self._rewinds if entry.step <= step]
        if changed:
            return changed[-1]
        piece = next(piece for piece in reversed(self._pieces) if piece.first <= step)
        if piece.steps is None:
            return piece.start
        if step >= piece.first + piece.steps:
            raise UserError(
                f"schedule.stages: end after {self.steps} steps, step {step + 1} has no learning"
                " rate; add a stage or lower train.steps"
            )
        return piece.start + (piece.end - piece.start) * _SHAPES[piece.shape](
            (step - piece.first + 1) / piece.steps
        )

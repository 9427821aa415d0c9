"""Stops a run whose loss or gradients stay non-finite. The engine has already left such steps out of the update."""

from __future__ import annotations

from llada.engine.base import StepResult
from llada.errors import RunError


class Guard:
    """Counts skipped steps in a row.

    Args:
        limit: how many may follow each other.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._skipped = limit, 0

    def check(self, step: int, result: StepResult, samples: range) -> None:
        """Raise RunError when more than `limit` steps in a row were skipped.

        Args:
            step: 1-based.
            samples: global sample indices of the step, named in the message.
        """
        self._skipped = 0 if result.applied else self._skipped + 1
        if self._skipped > self._limit:
            raise RunError(
                f"step {step}: loss {result.loss} and gradient norm {result.grad_norm}; {self._skipped} steps in a row were not "
                f"finite and updated "
                f"nothing (train.max_skipped: {self._limit}); samples {samples.start} to {samples.stop - 1} of the data order"
            )

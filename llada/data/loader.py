"""Step -> its plan and this rank's part of it, prepared in the background. Its whole state is the
step number.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from llada.data.step_plan import StepPlan

Prepared = tuple[StepPlan, list[Any]]
"""The plan of a step and what the engine prepared of this replica's micro-batches."""


class Loader:
    """Iterates over (step, plan, micro-batches) from `first` to `last` (exclusive), `ahead` steps
    prepared by a thread.

    Args:
        make: step -> plan and prepared micro-batches of this replica; a pure function of the step.
        first, last: steps, 0-based.
        ahead: steps held ready.

    An exception in `make` is raised where the step would have been returned.
    """

    def __init__(
        self, make: Callable[[int], Prepared], first: int, last: int, ahead: int = 2
    ) -> None:
        self._make, self._steps = make, range(first, last)
        self._ready: queue.Queue[object] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, StepPlan, list[Any]]]:
        for step in self._steps:
            item = self._ready.get()
            if isinstance(item, BaseException):
                raise item
            yield step, *item  # type: ignore[misc]

    def close(self) -> None:
        """Stop the thread; steps already prepared are dropped."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def _work(self) -> None:
        for step in self._steps:
            item: object
            try:
                item = self._make(step)
            except BaseException as error:  # handed to the consumer, which raises it
                item = error
            if not self._put(item) or isinstance(item, BaseException):
                return

    def _put(self, item: object) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

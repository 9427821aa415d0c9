"""Prepares the next steps in the background: the plan of each and this rank's part of it.

The loader's whole state is the number of the step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from llada.data.step_plan import StepPlan

MicroBatch = TypeVar("MicroBatch")
"""What the engine makes of a micro-batch."""

Prepared = tuple[StepPlan, list[MicroBatch]]
"""The plan of a step and the prepared micro-batches of this replica."""

_POLL_SECONDS = 0.05
"""How often a waiting thread looks whether it is to stop."""


class Loader(Generic[MicroBatch]):
    """Iterates over (step, plan, micro-batches) in order.

    Args:
        make: a pure function of the step.
        first, last: steps first..last-1, 0-based.
        prefetch: steps held ready.

    An exception in `make` is raised where the step would have been returned.
    """

    def __init__(
        self,
        make: Callable[[int], Prepared[MicroBatch]],
        first: int,
        last: int,
        prefetch: int = 2,
    ) -> None:
        self._make = make
        self._steps = range(first, last)
        self._ready: queue.Queue[Prepared[MicroBatch] | BaseException] = queue.Queue(prefetch)
        self._stop = threading.Event()
        # A daemon, so that a run which fails without `close` does not hang at its exit.
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, StepPlan, list[MicroBatch]]]:
        for step in self._steps:
            prepared = self._ready.get()
            if isinstance(prepared, BaseException):
                raise prepared
            plan, batches = prepared
            yield step, plan, batches

    def close(self) -> None:
        """Stop the thread; steps already prepared are dropped."""
        self._stop.set()
        # The thread may wait for room in the queue, so make some until it has ended.
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue

    def _work(self) -> None:
        for step in self._steps:
            try:
                prepared = self._make(step)
            except BaseException as error:  # the consumer raises it
                self._put(error)
                return
            if not self._put(prepared):
                return

    def _put(self, prepared: Prepared[MicroBatch] | BaseException) -> bool:
        """Wait for room in the queue; return False when the loader is to stop."""
        while not self._stop.is_set():
            try:
                self._ready.put(prepared, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

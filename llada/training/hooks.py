"""Hooks: code that runs at named moments of a training run.

`Watchdog` and `Profiler` are hooks. A hook sees the run and must not change it: no weights, no
data, no collective operations unless all ranks have the hook. Every rank calls its hooks at the
same moments, in the order of the list.

To add one, subclass `Hook`, override the moments you need, and pass it to
`llada.training.loop.train` in a script of your own:

    class PrintLoss(Hook):
        def on_step(self, done: int, result: StepResult) -> None:
            print(done, result.loss)

    train(load_config("pretrain.yaml"), StopRequest().install(), hooks=[PrintLoss()])
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from llada.engine.base import StepResult


class Hook:
    """Base class of hooks. Its methods do nothing; a subclass overrides those it needs.

    An exception in a hook ends the run, as any other does.
    """

    def on_start(self, done: int) -> None:
        """Before the first step of this process; `done` steps were done by earlier ones."""

    def on_step(self, done: int, result: StepResult) -> None:
        """When a step is reported, the run's `done`-th (1-based).

        On a GPU the next step is queued by then. Reading a number of `result` waits for the step.
        """

    def on_validation(self, done: int) -> None:
        """After the validation that follows `done` steps, even if nothing is held out."""

    def on_save(self, done: int) -> None:
        """After the checkpoint of `done` steps is complete on disk."""

    def on_end(self) -> None:
        """When the run closes: it finished, stopped or failed, perhaps before its first step."""


class HookList(Hook):
    """Several hooks as one, called in their order."""

    def __init__(self, hooks: Iterable[Hook]) -> None:
        self._hooks = list(hooks)

    def on_start(self, done: int) -> None:
        for hook in self._hooks:
            hook.on_start(done)

    def on_step(self, done: int, result: StepResult) -> None:
        for hook in self._hooks:
            hook.on_step(done, result)

    def on_validation(self, done: int) -> None:
        for hook in self._hooks:
            hook.on_validation(done)

    def on_save(self, done: int) -> None:
        for hook in self._hooks:
            hook.on_save(done)

    def on_end(self) -> None:
        """End every hook, the last one first, even if another fails."""
        with ExitStack() as last_first:
            for hook in self._hooks:
                last_first.callback(hook.on_end)

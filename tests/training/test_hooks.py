"""Hooks are called at the named moments of a run, and all of them end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from llada.config import build_config
from llada.engine.base import StepResult
from llada.training.hooks import Hook, HookList
from llada.training.loop import train
from llada.training.signals import StopRequest
from tests.workplace import CONFIG, Workplace


@dataclass
class Recorder(Hook):
    """Notes the moments of a run."""

    moments: list[tuple[str, int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def on_start(self, done: int) -> None:
        self.moments.append(("start", done))

    def on_step(self, done: int, result: StepResult) -> None:
        self.moments.append(("step", done))
        self.losses.append(result.loss)

    def on_validation(self, done: int) -> None:
        self.moments.append(("validation", done))

    def on_save(self, done: int) -> None:
        self.moments.append(("save", done))

    def on_end(self) -> None:
        self.moments.append(("end", -1))


def test_a_run_calls_its_hooks(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace.folder)
    config = build_config(
        {
            **CONFIG,
            "run": {"dir": "hooked", "threads": 2},
            "train": {"steps": 4},
            "validation": {"every": 2, "windows": 64},
            "checkpoint": {"every": 2, "asynchronous": False},
        }
    )
    recorder = Recorder()
    assert train(config, StopRequest(), hooks=[recorder]) == 0
    assert recorder.moments == [
        ("start", 0),
        ("step", 1),
        ("step", 2),
        ("validation", 2),
        ("save", 2),
        ("step", 3),
        ("step", 4),
        ("validation", 4),
        ("save", 4),
        ("end", -1),
    ]
    assert all(math.isfinite(loss) for loss in recorder.losses)


def test_every_hook_ends_even_where_another_fails() -> None:
    class Failing(Hook):
        def on_end(self) -> None:
            raise RuntimeError("on purpose")

    first = Recorder()
    last = Recorder()
    with pytest.raises(RuntimeError, match="on purpose"):
        HookList([first, Failing(), last]).on_end()
    assert first.moments == last.moments == [("end", -1)]

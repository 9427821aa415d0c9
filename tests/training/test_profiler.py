"""`logging.profile_steps`: a trace of some steps of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llada.config import build_config
from llada.engine.base import StepResult
from llada.training.loop import train
from llada.training.profiler import SKIPPED_STEPS, Profiler
from llada.training.signals import StopRequest
from tests.workplace import CONFIG, Workplace


def test_a_run_traces_its_steps(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace.folder)
    config = build_config(
        {
            **CONFIG,
            "run": {"dir": "profiled", "threads": 2},
            "train": {"steps": SKIPPED_STEPS + 4},
            "logging": {"profile_steps": 2},
        }
    )
    assert train(config, StopRequest()) == 0
    [trace] = Path("profiled/profile").iterdir()
    assert trace.name == f"step_{SKIPPED_STEPS + 2:08d}.json"
    events = json.loads(trace.read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{SKIPPED_STEPS}", f"ProfilerStep#{SKIPPED_STEPS + 1}"}
    assert any(event["name"] == "aten::addmm" or "::mm" in event["name"] for event in events)


def test_a_run_that_ends_early_writes_what_it_has(tmp_path: Path) -> None:
    def profile(folder: Path, num_steps: int) -> list[str]:
        profiler = Profiler(folder, 5)
        profiler.on_start(0)
        for step in range(1, num_steps + 1):
            profiler.on_step(step, result)
        profiler.on_end()
        return sorted(path.name for path in folder.glob("*"))

    result = StepResult.__new__(StepResult)
    assert profile(tmp_path / "none", SKIPPED_STEPS - 1) == []
    assert profile(tmp_path / "two", SKIPPED_STEPS + 2) == [f"step_{SKIPPED_STEPS + 2:08d}.json"]
    Profiler(tmp_path, 5).on_end()  # a run that failed before its first step

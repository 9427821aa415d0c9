"""Sinks, and cutting metrics.jsonl back to a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llada.config import Task
from llada.config.sections import LoggingSection
from llada.formatting import clock_time
from llada.training.reporting import metrics
from llada.training.reporting.loss_curve import plot_loss_curve
from llada.training.reporting.sinks import Console
from tests.workplace import Workplace


def test_cut_keeps_what_the_checkpoint_knows_and_sets_the_rest_aside(tmp_path: Path) -> None:
    rows = [json.dumps({"step": k, "loss": 0.1 * k}) for k in range(1, 7)]
    rows.insert(4, json.dumps({"step": 4, "nelbo_per_token": 1.5}))
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(rows) + '\n{"step": 7, "lo')
    (tmp_path / "validation").mkdir()
    for step in (4, 6):
        (tmp_path / "validation" / f"step_{step:08d}.npz").touch()
    assert metrics.cut(tmp_path, 4) == 3
    assert path.read_text().splitlines() == rows[:5]
    assert (tmp_path / "metrics.attempt-1.jsonl").read_text().splitlines() == [
        *rows[5:],
        '{"step": 7, "lo',
    ]
    assert (tmp_path / "validation.attempt-1" / "step_00000006.npz").exists()
    assert metrics.cut(tmp_path, 4) == 0
    assert (tmp_path / "validation" / "step_00000004.npz").exists()
    assert metrics.cut(tmp_path, 0) == 5
    assert path.read_text() == "" and (tmp_path / "metrics.attempt-2.jsonl").exists()
    assert (tmp_path / "validation.attempt-2" / "step_00000004.npz").exists()


def test_lines_are_json_even_when_a_value_is_not_finite(tmp_path: Path) -> None:
    sink = metrics.JsonLines(tmp_path)
    sink.write({"step": 1, "loss": math.nan, "inner": {"x": math.inf, "y": [1.0]}})
    sink.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": "nan",
        "inner": {"x": "inf", "y": [1.0]},
    }
    assert next(iter(metrics.read(tmp_path / "metrics.jsonl")))["step"] == 1


def test_the_console_prints_every_so_many_steps(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(5, 0, LoggingSection(every=2))
    for step in range(1, 6):
        console.write(
            {
                "step": step,
                "loss": 2.0,
                "tokens_per_second": 10.0,
                "mfu": 0.5,
                "lr": 1e-3,
                "seconds": 1.0,
            }
        )
        console.write({"step": step, "nelbo_per_token": 1.25})
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "step 2/5",
        "step 4/5",
        "step 5/5",
    ]


def test_nothing_is_drawn_without_steps(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot_loss_curve(tmp_path) is None


def test_durations_are_clock_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert [clock_time(s) for s in (0.4, 61, 3600, 93_784.6)] == [
        "0:00:00",
        "0:01:01",
        "1:00:00",
        "26:03:05",
    ]
    Console(110, 0, LoggingSection()).write(
        {"step": 10, "loss": 2.0, "tokens_per_second": 1.0, "mfu": 0.5, "lr": 1e-3, "seconds": 40.0}
    )
    assert capsys.readouterr().out.endswith("| ETA 1:06:40\n")


@pytest.mark.parametrize(("task", "panels"), [("pretrain", 1), ("sft", 2)])
def test_losses_that_are_no_common_quantity_have_axes_of_their_own(
    task: Task, panels: int, tmp_path: Path
) -> None:
    import matplotlib.image

    rows = [{"step": k, "loss": 1.0 / k} for k in range(1, 5)] + [
        {"step": 4, "nelbo_per_token": 2.5}
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = plot_loss_curve(tmp_path, task)
    assert picture is not None
    height, width, _ = matplotlib.image.imread(picture).shape
    assert (height / width > 0.7) == (panels == 2)


def test_tensorboard_and_wandb_take_the_same_lines(workplace: Workplace) -> None:
    logging = {"every": 1, "tensorboard": True, "wandb": True}
    config = workplace.config(
        "sinks.yaml", run={"dir": "sinks", "threads": 2}, train={"steps": 2}, logging=logging
    )
    workplace.run("pretrain", config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workplace.folder / "sinks" / "tensorboard"))
    events.Reload()
    losses = [line["loss"] for line in workplace.lines("sinks") if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert events.Scalars("corpora/corpus/bits_per_byte")
    run_id = (workplace.folder / "sinks" / "wandb_id").read_text()
    assert list((workplace.folder / "sinks" / "wandb").glob(f"offline-run-*-{run_id}"))

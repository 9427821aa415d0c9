"""`llada pretrain --rewind STEP lr=RATE`: back to a checkpoint with another learning rate,
recorded, nothing lost.
"""

from __future__ import annotations

import json
import re
import shutil

import yaml

from tests.workplace import Workplace


def folders(workplace: Workplace, run: str) -> list[str]:
    return sorted(path.name for path in (workplace.folder / run / "checkpoints").iterdir())


def test_back_to_a_checkpoint_with_another_rate(workplace: Workplace) -> None:
    shutil.copytree(workplace.folder / "whole", workplace.folder / "back")
    config = workplace.config("back.yaml", run={"dir": "back", "threads": 2})
    words = ("pretrain", config, "--rewind", "8", "lr=2e-4")
    out = workplace.run(*words).stdout
    assert "rewound from step 12 to step 8" in out
    assert (
        "resumed from back/checkpoints/step_00000008 at step 8; 5 later lines of metrics.jsonl set"
        " aside" in out
    )
    assert folders(workplace, "back") == [
        "step_00000004",
        "step_00000008",
        "step_00000012",
        "step_00000012.rewound-1",
    ]
    assert [
        path.name for path in (workplace.folder / "back" / "validation.attempt-1").iterdir()
    ] == ["step_00000012.npz"]
    assert [path.name for path in sorted((workplace.folder / "back" / "validation").iterdir())] == [
        f"step_{step:08d}.npz" for step in (4, 8, 12)
    ]
    before, after = workplace.lines("whole"), workplace.lines("back")
    losses = [[line for line in lines if "loss" in line] for lines in (before, after)]
    assert losses[1][:8] == losses[0][:8]
    assert [line["lr"] for line in losses[1][8:]] == [2e-4] * 4
    assert losses[1][8]["loss"] == losses[0][8]["loss"], (
        "the same data and noise; only the update after it differs"
    )
    assert losses[1][9]["loss"] != losses[0][9]["loss"]
    state = json.loads(
        (workplace.folder / "back" / "checkpoints" / "step_00000012" / "state.json").read_text()
    )
    [record] = state["lineage"]
    assert (record["rewound_to_step"], record["from_step"]) == (8, 12)
    assert record["schedule"]["rewinds"] == [{"step": 8, "lr": 2e-4}]
    # The same command again goes on where it is: a requeued job must not rewind twice.
    again = workplace.run(*words, "train.steps=13").stdout
    assert "rewound" not in again
    assert "resumed from back/checkpoints/step_00000012" in again
    # The run's own config goes on too; the old config would be another run.
    saved = yaml.safe_load((workplace.folder / "back" / "config.yaml").read_text())
    assert saved["schedule"]["rewinds"] == [{"step": 8, "lr": 2e-4}]
    assert (
        workplace.run("pretrain", "back/config.yaml", "train.steps=14").stdout.count(
            "finished 14 steps"
        )
        == 1
    )
    refused = workplace.run("pretrain", config, "train.steps=15", code=2).stderr
    assert "schedule.stages: learning rate of step 9: 0.0002 -> 0.0009 has changed since" in refused


def test_refusals(workplace: Workplace) -> None:
    said = workplace.run("pretrain", "whole.yaml", "--rewind", "7", code=2).stderr
    assert (
        said
        == "error: --rewind: no checkpoint after step 7 in whole/checkpoints; there are: 4, 8, 12\n"
    )
    said = workplace.run("pretrain", "whole.yaml", "--rewind", "8", "lr=fast", code=2).stderr
    assert said == "error: override 'lr=fast': the learning rate must be a number, as in lr=1e-4\n"
    said = workplace.run("pretrain", "whole.yaml", "lr=1e-4", code=2).stderr
    assert re.match(r"error: lr: unknown setting", said)
    assert folders(workplace, "whole") == ["step_00000004", "step_00000008", "step_00000012"]

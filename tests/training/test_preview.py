"""`llada data step`: what a step reads and masks, against the plan itself."""

from __future__ import annotations

import re

import pytest

from llada.data.manifest import TRAIN
from llada.data.pretrain import PretrainData
from llada.errors import UserError
from llada.training.configure import load_config
from llada.training.preview import describe_step
from tests.workplace import Workplace


def test_the_text_says_what_the_plan_holds(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace.folder)
    config = load_config("whole.yaml")
    text = describe_step(config, 3, samples=8)
    data = PretrainData(config)
    plan = data.plan(2)
    assert f"step 3: samples 16 to 23, {len(plan.lengths)} segments, 512 tokens" in text
    shown = re.findall(r"\[(\d+), (\d+)\) t = ([\d.]+), (\d+) masked", text)
    expected = []
    for i in range(8):
        window = data.window(TRAIN, plan, i)
        masked = data.objective.corrupt(window).predicted
        for start, end, t in zip(window.bounds[:-1], window.bounds[1:], window.t, strict=True):
            expected.append(
                (str(start), str(end), f"{t:.4f}", str(((masked >= start) & (masked < end)).sum()))
            )
    assert shown == expected
    documents = [1 + len(data.readers[TRAIN][0].document_starts(int(w))) for w in plan.examples]
    assert [int(n) for n in re.findall(r"window \d+, (\d+) documents", text)] == documents


def test_past_the_end(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace.folder)
    with pytest.raises(UserError, match=r"step: 13 is past the run's last, train.steps = 12"):
        describe_step(load_config("whole.yaml"), 13, 1)

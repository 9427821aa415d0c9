"""`llada data step`: what a step reads and masks, against the plan itself."""

from __future__ import annotations

import re

import pytest

from llada.data.manifest import TRAIN
from llada.data.pretrain import PretrainData
from llada.errors import UserError
from llada.objectives import TOKENS
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
    assert f"step 3: samples 16 to 23, {len(plan.groups)} noise groups, 512 tokens" in text
    shown = re.findall(r"\[(\d+), (\d+)\) t = ([\d.]+), (\d+) masked", text)
    expected = []
    for i in range(8):
        row = data.row(TRAIN, plan, i)
        masked = data.objective.corrupt(row, data.key).terms[TOKENS].positions
        for start, end, t in zip(row.bounds[:-1], row.bounds[1:], row.groups.t, strict=True):
            expected.append(
                (str(start), str(end), f"{t:.4f}", str(((masked >= start) & (masked < end)).sum()))
            )
    assert shown == expected
    documents = [1 + len(data.readers[TRAIN][0].document_starts(int(w))) for w in plan.examples]
    assert [int(n) for n in re.findall(r"window \d+, (\d+) documents", text)] == documents


def test_without_noise_the_text_is_shown(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace.folder)
    config = load_config("whole.yaml", ["objective={name: autoregressive}"])
    text = describe_step(config, 1, samples=1)
    assert "objective: autoregressive" in text
    assert "masked" not in text and "t:" not in text and "▁" not in text
    data = PretrainData(config)
    row = data.row(TRAIN, data.plan(0), 0)
    first = data.tokenizer().decode(row.tokens[: row.bounds[1]][:8].tolist())
    assert f"[0, {row.bounds[1]}) predicted: {' '.join(first.split())}" in text


def test_past_the_end(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace.folder)
    with pytest.raises(UserError, match=r"step: 13 is past the run's last, train.steps = 12"):
        describe_step(load_config("whole.yaml"), 13, 1)

"""`llada sft` end to end: the published loss, any micro-batch, a start from pretrained weights,
kill -9 and go on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llada.config import build_config
from llada.data.manifest import TRAIN
from llada.data.tasks import open_data
from llada.engine.megatron import MegatronEngine
from llada.noise import mask_uniforms
from tests.engine.support import OracleTrainer, canonical
from tests.preparation import prepare_sft
from tests.workplace import CONFIG, Workplace

SFT: dict[str, Any] = {
    **{key: CONFIG[key] for key in ("precision", "model", "checkpoint", "logging")},
    "task": "sft",
    "seed": 9,
    "train": {"steps": 12},
    "batch": {"global": 8, "micro": 4},
    "data": {"sequence_length": 64, "mixture": [{"path": "talks"}]},
    "schedule": {"stages": [{"shape": "linear", "end": 1e-3, "steps": 4}, {"shape": "constant"}]},
    "validation": {"every": 4, "windows": 16},
}


@pytest.fixture(scope="module")
def sft_workplace(workplace: Workplace) -> Workplace:
    """The corpus `talks` of the workplace's tokenizer."""
    rng = np.random.default_rng(0)
    names = ["open", "close", "read", "write", "seek"]
    rows = []
    for i in range(120):
        a, b = rng.choice(names, 2, replace=False)
        rows.append(
            {
                "prompt": f"What comes after {a} and {b}, case {i}?",
                "response": f"{b} then {a}" + "." * int(rng.integers(1, 9)),
            }
        )
    rows += [{"prompt": "long " * 90, "response": "never read"}]
    (workplace.folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_sft(
        [workplace.folder / "talks.jsonl"],
        workplace.folder / "tokenizer",
        workplace.folder / "talks",
        validation_fraction=0.2,
    )
    return workplace


def config(sft_workplace: Workplace, name: str, init: bool = True, **sections: Any) -> str:
    run = {"dir": name, "threads": 2, **({"init_from": "whole"} if init else {})}
    (sft_workplace.folder / f"{name}.yaml").write_text(
        yaml.safe_dump({**SFT, "run": run, **sections})
    )
    return f"{name}.yaml"


@pytest.mark.parametrize("micro", [1, 2, 8])
@pytest.mark.parametrize("masking", ["bernoulli", "fixed_count"])
def test_the_loss_is_the_published_formula_whatever_the_micro_batch(
    micro: int, masking: str, sft_workplace: Workplace
) -> None:
    """Mean over the conversations of: sum over masked response tokens of loss / p, over the
    response's length with its padding.
    """
    raw = {
        **SFT,
        "run": {"dir": "unused"},
        "batch": {"global": 8, "micro": micro},
        "objective": {"masking": masking},
    }
    raw["data"] = {
        "sequence_length": 64,
        "mixture": [{"path": str(sft_workplace.folder / "talks")}],
    }
    settings = build_config(raw)
    data, engine = open_data(settings), MegatronEngine(settings)
    try:
        plan = data.plan(1)
        batches = [data.batch(plan, range(i, i + micro)) for i in range(0, 8, micro)]
        trainer = OracleTrainer(settings, canonical(engine))
        total = torch.zeros((), dtype=torch.float64)
        for i in range(8):
            tokens = torch.from_numpy(data.row(TRAIN, plan, i).tokens)
            ((start, end),) = plan.groups_of(i).spans.tolist()
            t, size = float(plan.groups_of(i).t[0]), end - start
            draws = mask_uniforms(settings.seed, int(plan.samples[i]), 64)
            if masking == "bernoulli":
                p = (1 - 1e-3) * t + 1e-3
                chosen = [k for k in range(start, end) if draws[k] < p]
            else:
                chosen = sorted(range(start, end), key=lambda k: draws[k])[: 1 + int(t * size)]
                p = len(chosen) / size
            noisy = tokens.clone()
            noisy[chosen] = data.manifest.mask_id
            row = noisy[:end]  # the filler is a segment of its own: the conversation never sees it
            logits = trainer.oracle(row[None], torch.zeros(1, end, dtype=torch.long))[0]
            losses = torch.nn.functional.cross_entropy(logits, tokens[:end], reduction="none")
            total = total + losses[chosen].double().sum() / p / size / 8
        total.backward()
        norm = (
            torch.stack([w.grad.double().square().sum() for w in trainer.oracle.w.values()])
            .sum()
            .sqrt()
        )
        result = engine.train_step(batches, 1e-3)
        assert result.loss == pytest.approx(float(total.detach()), rel=1e-6)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)
    finally:
        engine.close()


def test_a_killed_run_repeats_the_uninterrupted_one(sft_workplace: Workplace) -> None:
    whole = sft_workplace.run("sft", config(sft_workplace, "talked"))
    assert "initialized from whole/checkpoints/step_00000012 (weights)" in whole.stdout
    assert "1 conversations (1 by their prompt alone; number" in whole.stdout
    listed = [
        json.loads(line)
        for line in (sft_workplace.folder / "talked" / "too_long.jsonl").read_text().splitlines()
    ]
    assert len(listed) == 1
    lines = sft_workplace.lines("talked")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[-1]["tokens"] < 12 * 8 * 64, "filler is in no count"
    held_out = [line["nelbo_per_token"] for line in lines if "nelbo_per_token" in line]
    assert [line["step"] for line in lines if "nelbo_per_token" in line] == [0, 4, 8, 12]
    assert held_out[-1] < held_out[0]
    name = config(sft_workplace, "killed")
    rng = random.Random(0)
    for _ in range(2):
        process = sft_workplace.start("sft", name)
        path = sft_workplace.folder / "killed" / "metrics.jsonl"
        target = rng.randint(2, 9)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if (
                path.exists()
                and sum('"loss"' in line for line in path.read_text().splitlines()) >= target
            ):
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    sft_workplace.run("sft", name)
    assert sft_workplace.lines("killed") == lines
    state = json.loads(
        (
            sft_workplace.folder / "killed" / "checkpoints" / "step_00000012" / "state.json"
        ).read_text()
    )
    assert state["tokens"] == steps[-1]["tokens"]
    assert state["lineage"][-1]["init_from"] == "whole/checkpoints/step_00000012"


def test_a_diffusion_model_may_be_fine_tuned_from_left_to_right(sft_workplace: Workplace) -> None:
    """Which is said, learns, and writes answers."""
    name = config(sft_workplace, "causal", objective={"name": "autoregressive"})
    told = sft_workplace.run("sft", name).stdout
    assert "was trained as masked, and this run trains autoregressive" in told
    lines = sft_workplace.lines("causal")
    losses = [line["nelbo_per_token"] for line in lines if "nelbo_per_token" in line]
    assert losses[-1] < losses[0] and all(line.get("exact") for line in lines if "corpora" in line)
    words = ("What comes after open and read, case 3?", "--chat", "--length", "8")
    sft_workplace.run("sample", "causal", *words)


def test_llada_data_step_shows_responses(sft_workplace: Workplace) -> None:
    name = config(sft_workplace, "shown", init=False)
    out = sft_workplace.run("data", "step", name, "1").stdout
    assert "8 noise groups" in out
    assert "conversation " in out
    assert " masked: " in out


@pytest.mark.parametrize(
    ("command", "sections", "message"),
    [
        (
            "sft",
            {"task": "pretrain", "sft": {"pad_group": 2}},
            "task: refused.yaml says 'pretrain', `llada sft` runs task 'sft' only",
        ),
        (
            "pretrain",
            {},
            (
                "task: refused.yaml says 'sft', `llada pretrain` runs task 'pretrain' only; use"
                " `llada sft`"
            ),
        ),
        (
            "sft",
            {"data": {"sequence_length": 64, "mixture": [{"path": "corpus"}]}},
            "was made by `llada data prepare`",
        ),
        (
            "sft",
            {"data": {"sequence_length": 8, "mixture": [{"path": "talks"}]}},
            "data.sequence_length: 8 is too short",
        ),
    ],
)
def test_refusals(
    command: str, sections: dict[str, Any], message: str, sft_workplace: Workplace
) -> None:
    done = sft_workplace.run(
        command, config(sft_workplace, "refused", init=False, **sections), code=2
    )
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (sft_workplace.folder / "refused").exists()

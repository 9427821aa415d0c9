"""Validation: the same noise every time, an honest standard error, and the sum it claims to be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.prepare import prepare
from llada.config import build_config
from llada.data.base import VALIDATION
from llada.data.pretrain import PretrainData
from llada.engine.megatron import MegatronEngine
from llada.objectives import MaskedDiffusion
from llada.training.validation import ROTATIONS, Validator, estimate, unigram_entropy
from tests.engine.support import OracleTrainer, canonical
from tests.workplace import CONFIG, Workplace


def made(workplace: Workplace, micro: int, windows: int = 16, **data: object) -> tuple[PretrainData, MegatronEngine]:
    raw = {**CONFIG, "batch": {"global": 8, "micro": micro}, "validation": {"every": 4, "windows": windows}}
    raw["data"] = {**CONFIG["data"], "mixture": [{"path": str(workplace.folder / "corpus")}], **data}
    config = build_config(raw)
    return PretrainData(config), MegatronEngine(config)


@pytest.fixture
def parts(workplace: Workplace) -> Iterator[tuple[PretrainData, MegatronEngine]]:
    data, engine = made(workplace, 4)
    yield data, engine
    engine.close()


def test_equals_a_plain_computation_of_the_bound(parts: tuple[PretrainData, MegatronEngine]) -> None:
    """Every draw alone through the oracle: mean over the segments of L/n times the summed loss, per token."""
    data, engine = parts
    validator = Validator(data, engine.place)
    line = validator(engine)
    plan = validator.plan(0)
    trainer = OracleTrainer(data.config, canonical(engine))
    purpose = f"validation/{data.corpora[0].manifest.fingerprint(VALIDATION)}"
    objective = MaskedDiffusion(0, data.manifest.mask_id)  # the noise is the measure's, whatever the run's seed
    assert data.config.seed != 0
    total, deciles = 0.0, {}
    for i in range(len(plan.samples)):
        window = data.window(VALIDATION, plan, i)
        corrupted = objective.corrupt(window, masking="fixed_count", purpose=purpose)
        segment = np.repeat(np.arange(len(window.bounds) - 1), np.diff(window.bounds))
        with torch.no_grad():
            logits = trainer.oracle(torch.from_numpy(corrupted.inputs)[None], torch.from_numpy(segment)[None])[0]
        each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(window.tokens), reduction="none").numpy()
        for k in range(len(window.bounds) - 1):
            inside = (corrupted.predicted >= window.bounds[k]) & (corrupted.predicted < window.bounds[k + 1])
            positions = corrupted.predicted[inside]
            assert len(positions) == 1 + math.floor(window.t[k] * (window.bounds[k + 1] - window.bounds[k]))
            size = window.bounds[k + 1] - window.bounds[k]
            loss = size / len(positions) * each[positions].sum()
            total += loss
            sums = deciles.setdefault(int(window.t[k] * 10), [0.0, 0])
            sums[0], sums[1] = sums[0] + loss, sums[1] + size
    assert line["nelbo_per_token"] == pytest.approx(total / plan.lengths.sum(), rel=1e-5)
    for d, row in enumerate(line["corpora"][data.mixture.sources[0].name]["t_deciles"]):
        assert (row is None) == (d not in deciles)
        if row is not None:
            assert row["nelbo_per_token"] == pytest.approx(deciles[d][0] / deciles[d][1], rel=1e-5)
    _, tokens, text_bytes = data.corpora[0].manifest.totals(VALIDATION)
    assert line["bits_per_byte"] == pytest.approx(line["nelbo_per_token"] / math.log(2) * tokens / text_bytes)


def test_the_same_noise_whatever_the_micro_batch_or_the_seed(workplace: Workplace) -> None:
    lines = []
    for micro in (1, 2, 8):
        data, engine = made(workplace, micro)
        try:
            lines.append(Validator(data, engine.place)(engine)["nelbo_per_token"])
        finally:
            engine.close()
    assert lines[1:] == [pytest.approx(lines[0], rel=1e-6)] * 2
    seen = []
    for seed in (1, 2):
        data = PretrainData(
            build_config({**CONFIG, "seed": seed, "data": {**CONFIG["data"], "mixture": [{"path": str(workplace.folder / "corpus")}]}})
        )
        validator = Validator(data, engine.place)
        plan = validator.plan(0)
        seen.append((plan.t.tolist(), [batch.inputs.tolist() for batch in validator._batches(plan, 0)]))
    assert seen[0] == seen[1]


def test_t_is_stratified_within_a_rotation_and_masks_differ_when_windows_repeat(
    parts: tuple[PretrainData, MegatronEngine], workplace: Workplace
) -> None:
    data, engine = parts
    count = 10 * data.readers[VALIDATION][0].count // ROTATIONS * ROTATIONS
    config = build_config(
        {
            **CONFIG,
            "validation": {"every": 1, "windows": count},
            "data": {"sequence_length": 64, "mixture": [{"path": str(workplace.folder / "corpus")}]},
        }
    )
    validator = Validator(PretrainData(config), engine.place)
    plan = validator.plan(0)
    for rotation in range(ROTATIONS):
        gaps = np.diff(np.sort(plan.t[np.arange(count) % ROTATIONS == rotation]))
        np.testing.assert_allclose(gaps, ROTATIONS / count, atol=1e-12)
    firsts = {round(float(plan.t[np.arange(count) % ROTATIONS == rotation].min()), 9) for rotation in range(ROTATIONS)}
    assert len(firsts) == ROTATIONS, "the rotations' offsets are independent draws"
    same = np.flatnonzero(plan.items == plan.items[0])
    assert len(same) >= 9
    masks = {tuple(data.objective.corrupt(data.window(VALIDATION, plan, int(i)), masking="fixed_count").predicted) for i in same}
    assert len(masks) == len(same)


def test_the_standard_error_covers_the_truth() -> None:
    """Over many draws of 8 means, the interval mean ± 2.365 errors (t, 7 degrees of freedom) holds the truth 95 % of the time."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(4000):
        e = estimate(rng.normal(3.0, 0.7, size=8))
        inside += abs(e.mean - 3.0) <= 2.365 * e.error
    assert abs(inside / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)
    assert math.isnan(estimate([1.0]).error)


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.array([1, 1, 0, 2])) == pytest.approx(1.5 * math.log(2))


def test_a_corpus_without_validation_documents_trains_without(workplace: Workplace) -> None:
    config = workplace.config(
        "without.yaml",
        run={"dir": "without", "threads": 2},
        train={"steps": 4},
        data={"sequence_length": 64, "mixture": [{"path": "other"}]},
    )
    out = workplace.run("pretrain", config).stdout
    assert "nothing held out that fits: trains without validation" in out
    assert not any("nelbo_per_token" in line for line in workplace.lines("without"))


def test_a_mixture_reports_each_corpus(workplace: Workplace) -> None:
    prepare([made_up_texts(workplace)], workplace.folder / "tokenizer", workplace.folder / "second", validation_fraction=0.3)
    mixture = [{"path": "corpus", "weight": 3.0}, {"path": "second", "weight": 1.0}]
    config = workplace.config(
        "mixed.yaml", run={"dir": "mixed", "threads": 2}, train={"steps": 2}, data={"sequence_length": 64, "mixture": mixture}
    )
    workplace.run("pretrain", config)
    line = next(line for line in workplace.lines("mixed") if "nelbo_per_token" in line)
    first, other = line["corpora"]["corpus"], line["corpora"]["second"]
    assert line["nelbo_per_token"] == pytest.approx(0.75 * first["nelbo_per_token"] + 0.25 * other["nelbo_per_token"])
    assert line["nelbo_per_token_se"] == pytest.approx(math.hypot(0.75 * first["nelbo_per_token_se"], 0.25 * other["nelbo_per_token_se"]))


def made_up_texts(workplace: Workplace) -> Path:
    """Forty made-up documents as a JSONL file."""
    path = workplace.folder / "made.jsonl"
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "one", "two"]
    path.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 200))}) + "\n" for _ in range(40)))
    return path

"""A checkpoint moves to another layout: every stored tensor element by element, and the run goes on
as if nothing had happened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llada.engine.layout import sample_offsets
from llada.engine.megatron import MegatronEngine
from tests.distributed.pool import RankPool
from tests.engine import saves
from tests.engine.support import OracleTrainer, canonical, small_config, step_batches

RATES = [1e-3 * min(1.0, (step + 1) / 10) for step in range(15)]
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 x PP2 x DP2": {"tensor": 2, "pipeline": 2},
    "DP8": {},
    "PP2 x VP2 x DP4": {"pipeline": 2, "virtual_pipeline": 2},
    "TP2+SP x CP2 x DP2": {"tensor": 2, "sequence": True, "context": 2},
    "PP2 uneven x DP4, overlap": {
        "pipeline": 2,
        "layers_per_stage": [1, 3],
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
}


def steps_on_ranks(
    parallel: dict[str, Any],
    settings: dict[str, Any],
    load: Path | None,
    steps: range,
    save: Path | None,
) -> Any:
    """Load, train, save: losses and gradient norms of the steps, and every optimizer step count."""
    config = small_config(
        settings.get("model"),
        parallel,
        batch={"global": 8, "micro": 1},
        precision=settings.get("precision", "fp32"),
    )
    engine = MegatronEngine(config)
    try:
        if load is not None:
            engine.load(load)
        own_rank = engine.parallel_rank
        own = [part[0] for part in sample_offsets(8, 1, own_rank.data_rank, own_rank.data_size)]
        results = [
            engine.train_step([step_batches(config, step)[i] for i in own], RATES[step])
            for step in steps
        ]
        counts = {
            float(moments["step"])
            for part in engine._optimizers()
            for moments in part.optimizer.state.values()
        }
        if save is not None:
            saves.save(engine, save)
        return [(result.loss, result.grad_norm) for result in results], counts
    finally:
        engine.close()


def folder(path: Path) -> Path:
    path.mkdir()
    return path


SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "tied": {"model": {"tie_embeddings": True}},
}


@pytest.fixture(scope="module", params=SETTINGS)
def saved(
    request: pytest.FixtureRequest, pool: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """Settings, and the folder of a checkpoint under TP2 x PP2 x DP2 after three steps."""
    settings, first = (
        SETTINGS[request.param],
        folder(tmp_path_factory.mktemp(request.param) / "first"),
    )
    pool.run(steps_on_ranks, LAYOUTS["TP2 x PP2 x DP2"], settings, None, range(3), first)
    return settings, first


@pytest.mark.parametrize(
    "target", ["DP8", "PP2 x VP2 x DP4", "TP2+SP x CP2 x DP2", "PP2 uneven x DP4, overlap"]
)
def test_every_weight_moment_and_count_moves(
    target: str, saved: tuple[dict[str, Any], Path], pool: RankPool, tmp_path: Path
) -> None:
    """Loaded on another layout, and saved there again."""
    settings, first = saved
    second = folder(tmp_path / "second")
    answers = pool.run(steps_on_ranks, LAYOUTS[target], settings, first, range(3, 3), second)
    assert {count for _, counts in answers for count in counts} == {3.0}
    before, after = saves.read_tensors(first), saves.read_tensors(second)
    assert before.keys() == after.keys()
    kinds = {name.split(".")[2] for name in before if name.startswith("optimizer.state.")}
    assert kinds == {"param", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert (
        max(float(value.abs().max()) for name, value in before.items() if ".exp_avg." in name) > 0
    )


def weights_on_ranks(load: Path) -> dict[str, torch.Tensor]:
    """This rank's weights in an fp32 run on eight replicas that starts from the weights of a
    checkpoint.
    """
    engine = MegatronEngine(small_config(batch={"global": 8, "micro": 1}))
    try:
        engine.load(load, optimizer=False)
        return canonical(engine)
    finally:
        engine.close()


def test_every_replica_gets_the_masters_of_a_bf16_run(pool: RankPool, tmp_path: Path) -> None:
    first = folder(tmp_path / "first")
    pool.run(steps_on_ranks, LAYOUTS["DP8"], {"precision": "bf16"}, None, range(3), first)
    stored = saves.read_tensors(first)
    masters = {
        name: value for name, value in stored.items() if name.startswith("optimizer.state.param.")
    }
    expected = sorted(float(value.double().sum()) for value in masters.values())
    assert expected != sorted(float(value.bfloat16().double().sum()) for value in masters.values())
    answers = pool.run(weights_on_ranks, first)
    total = sum(value.double().sum() for value in answers[0].values())
    assert float(total) == pytest.approx(sum(expected), rel=1e-12)
    assert all(
        torch.equal(value, answer[name])
        for answer in answers[1:]
        for name, value in answers[0].items()
    )


def test_a_run_moves_twice_and_repeats_the_uninterrupted_one(
    pool: RankPool, tmp_path: Path
) -> None:
    """TP2 x PP2 to step 5, DP8 to step 10, one process to step 15; against the oracle that never
    stopped.
    """
    config = small_config()
    alone = MegatronEngine(config)
    try:
        trainer = OracleTrainer(config, canonical(alone))
    finally:
        alone.close()
    expected = [trainer.step(step_batches(config, step), RATES[step])[:2] for step in range(15)]
    five, ten = folder(tmp_path / "five"), folder(tmp_path / "ten")
    losses = pool.run(steps_on_ranks, LAYOUTS["TP2 x PP2 x DP2"], {}, None, range(5), five)[0][0]
    losses += pool.run(steps_on_ranks, LAYOUTS["DP8"], {}, five, range(5, 10), ten)[0][0]
    losses += steps_on_ranks({}, {}, ten, range(10, 15), None)[0]
    for ours, theirs in zip(losses, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)

"""Every layout of four ranks against the single-process oracle: losses, gradient norms and weights over five optimizer steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llada.engine.layout import sample_offsets
from llada.engine.megatron import MegatronEngine
from llada.model import weights
from tests.distributed.pool import RankPool
from tests.engine.support import OracleTrainer, small_config, step_batches

STEPS = 5
RATES = [1e-3 * (step + 1) / 10 for step in range(STEPS)]

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DP4": ({}, {}),
    "TP2 x DP2": ({"tensor": 2}, {}),
    "TP2+SP x DP2": ({"tensor": 2, "sequence": True}, {}),
    "TP4+SP": ({"tensor": 4, "sequence": True}, {"num_query_groups": 4}),
    "PP2 x DP2": ({"pipeline": 2}, {}),
    "PP4": ({"pipeline": 4}, {}),
    "PP2 x VP2 x DP2": ({"pipeline": 2, "virtual_pipeline": 2}, {}),
    "CP2 x DP2": ({"context": 2}, {}),
    "CP4": ({"context": 4}, {}),
    "TP2+SP x PP2": ({"tensor": 2, "sequence": True, "pipeline": 2}, {}),
    "TP2+SP x CP2": ({"tensor": 2, "sequence": True, "context": 2}, {}),
    "CP2 x PP2": ({"context": 2, "pipeline": 2}, {}),
    "tied head, PP2 x DP2": ({"pipeline": 2}, {"tie_embeddings": True}),
    "tied head, TP2+SP x PP2": ({"tensor": 2, "sequence": True, "pipeline": 2}, {"tie_embeddings": True}),
    "tied head, PP2 x VP2 x DP2": ({"pipeline": 2, "virtual_pipeline": 2}, {"tie_embeddings": True}),
}


def train_on_ranks(parallel: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Five steps on this rank: losses, gradient norms, and its weights before and after."""
    config = small_config(model, parallel)
    engine = MegatronEngine(config)
    try:
        place = engine.place
        before = {n: p.detach().clone() for n, p in engine.parameters().items()}
        results = []
        for step, rate in enumerate(RATES):
            every = step_batches(config, step)
            firsts = [
                offsets[0] // config.batch.micro
                for offsets in sample_offsets(config.batch.global_, config.batch.micro, place.data_rank, place.data_size)
            ]
            results.append(engine.train_step([every[i] for i in firsts], rate))
        sums = engine.evaluate([every[i] for i in firsts], 64)
        after = {n: p.detach().clone() for n, p in engine.parameters().items()}
        return {"results": results, "before": before, "after": after, "tensor": engine._tensor_place(), "sums": sums}
    finally:
        engine.close()


def whole(answers: list[dict[str, Any]], key: str, config: Any) -> dict[str, torch.Tensor]:
    return weights.gather(config.model, [(answer[key], *answer["tensor"]) for answer in answers])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps_equal_the_oracle(layout: str, pool: RankPool) -> None:
    parallel, model = LAYOUTS[layout]
    answers = pool.run(train_on_ranks, parallel, model)
    config = small_config(model)
    start = whole(answers, "before", config)
    assert set(start) == set(weights.canonical_shapes(config.model))
    for name, value in start.items():  # every layout starts from the same keyed weights
        piece = weights.Piece(name, (0, value.shape[0]), (0, value.shape[1]) if value.dim() > 1 else None, 0)
        assert torch.equal(value, weights.initial_values(config.model, config.seed, piece).float()), name
    trainer = OracleTrainer(config, start)
    for step, rate in enumerate(RATES):
        loss, norm, _ = trainer.step(step_batches(config, step), rate)
        for answer in answers:
            assert answer["results"][step].loss == pytest.approx(loss, rel=1e-6)
            assert answer["results"][step].grad_norm == pytest.approx(norm, rel=1e-6)
    after = whole(answers, "after", config)
    for name, wanted in trainer.oracle.w.items():
        assert (after[name] - wanted).abs().max() <= 0.02 * sum(RATES), name
    with torch.no_grad():
        total = float(trainer.loss(step_batches(config, STEPS - 1))) * config.tokens_per_step
    for answer in answers:
        assert float(answer["sums"].sum()) == pytest.approx(total, rel=1e-5)

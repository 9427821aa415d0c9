"""Every layout of eight ranks against the single-process oracle, over five optimizer steps.

Compared are losses, gradient norms, every gradient tensor before clipping at the first and the last
step, and the weights after the last. Rows hold packed documents and cuts, some segments are a
single token, and queries are grouped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llada.engine.base import Limits
from llada.engine.layout import sample_offsets
from llada.engine.megatron import MegatronEngine
from llada.model import weights
from llada.objectives import Batch
from tests.distributed.layouts import LAYOUTS, NO_OVERLAP
from tests.distributed.pool import RankPool
from tests.engine.support import (
    OracleTrainer,
    made_engine,
    small_config,
    step_batches,
    with_nan_weights,
)
from tests.model.assembly import gather

STEPS = 5
RATES = [1e-3 * (step + 1) / 10 for step in range(STEPS)]


def gradients(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """This rank's reduced gradients by name.

    A rank has those of the elements that its part of the distributed optimizer owns; the others are
    NaN.
    """
    owned = {}
    names = {id(parameter): name for name, parameter in engine.parameters().items()}
    for part in engine._optimizers():
        for group in part.model_float16_groups + part.model_fp32_groups:
            for parameter in group:
                span = part._get_model_param_range_map(parameter)["param"]
                flat = torch.full((parameter.numel(),), torch.nan)
                flat[span.start : span.end] = parameter.main_grad.flatten()[span.start : span.end]
                owned[names[id(parameter)]] = flat.view(parameter.shape)
    return owned


def train_on_ranks(
    parallel: dict[str, Any], model: dict[str, Any], micro: int, objective: dict[str, Any]
) -> dict[str, Any]:
    """Five steps on this rank: losses, gradient norms, gradients of the first and the last step,
    and its weights before and after.
    """
    batch = {"global": 8, "micro": micro}
    config = small_config(model, parallel, batch=batch, objective=objective)
    engine = made_engine(config)
    try:
        own_rank = engine.parallel_rank
        before = {n: p.detach().clone() for n, p in engine.parameters().items()}
        results, grads = [], []
        offsets = sample_offsets(
            config.batch.global_, config.batch.micro, own_rank.data_rank, own_rank.data_size
        )
        own = [part[0] // config.batch.micro for part in offsets]
        for step, rate in enumerate(RATES):
            every = step_batches(config, step)
            results.append(engine.train_step([every[i] for i in own], rate))
            if step in (0, STEPS - 1):
                grads.append(gradients(engine))
        sums = engine.evaluate([every[i] for i in own], 64)
        after = {n: p.detach().clone() for n, p in engine.parameters().items()}
        return {
            "results": results,
            "grads": grads,
            "before": before,
            "after": after,
            "tensor": engine._tensor_rank_and_size(),
            "sums": sums,
        }
    finally:
        engine.close()


def whole(
    answers: list[dict[str, Any]], tensors: list[dict[str, torch.Tensor]], config: Any
) -> dict[str, torch.Tensor]:
    """Canonical tensors from the ranks' parts; where one rank has NaN another one has the value."""
    by_tensor_rank: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for answer, part in zip(answers, tensors, strict=True):
        merged = by_tensor_rank.setdefault(answer["tensor"], {})
        for name, value in part.items():
            if name in merged:
                value = torch.where(merged[name].isnan(), value, merged[name])
            merged[name] = value
    shards = [(merged, rank, size) for (rank, size), merged in by_tensor_rank.items()]
    return gather(config.model, shards)


def micro_batch_size(parallel: dict[str, Any]) -> int:
    """Sequences of a micro-batch, so that each replica has two or, with a pipeline, as many as
    chunks of the model.

    The collectives of eight ranks on two cores take their time; more micro-batches repeat them.
    Eight replicas have one each.
    """
    stages = parallel.get("pipeline", 1)
    replica = parallel.get("tensor", 1) * parallel.get("context", 1) * stages
    chunks = stages * parallel.get("virtual_pipeline", 1)
    return max(1, replica // max(2, chunks))


def check_training(
    pool: RankPool,
    parallel: dict[str, Any],
    model: dict[str, Any],
    micro: int,
    objective: dict[str, Any] | None = None,
) -> None:
    """Run a layout and compare all there is to compare."""
    objective = objective or {}
    answers = pool.run(train_on_ranks, parallel, model, micro, objective)
    config = small_config(model, objective=objective)
    start = whole(answers, [answer["before"] for answer in answers], config)
    assert set(start) == set(weights.canonical_shapes(config.model))
    for name, value in start.items():  # every layout starts from the same keyed weights
        columns = (0, value.shape[1]) if value.dim() > 1 else None
        rectangle = weights.WeightRectangle(name, (0, value.shape[0]), columns, 0)
        expected = weights.initial_values(config.model, config.seed, rectangle).float()
        assert torch.equal(value, expected), name
    trainer = OracleTrainer(config, start)
    for step, rate in enumerate(RATES):
        loss, norm, expected_grads = trainer.step(step_batches(config, step), rate)
        for answer in answers:
            assert answer["results"][step].loss == pytest.approx(loss, rel=1e-6)
            assert answer["results"][step].grad_norm == pytest.approx(norm, rel=1e-6)
        if step in (0, STEPS - 1):
            grads = whole(answers, [answer["grads"][step > 0] for answer in answers], config)
            # in fp32 the optimizer clips its gradients in own_rank
            scale = max(1.0, norm / config.optimizer.clip)
            wrong = [
                name
                for name, expected in expected_grads.items()
                if not (grads[name] * scale - expected).norm() <= 1e-5 * expected.norm()
            ]
            assert not wrong, f"gradients of step {step + 1}"
    after = whole(answers, [answer["after"] for answer in answers], config)
    for name, value in trainer.oracle.w.items():
        assert (after[name] - value).abs().max() <= 0.02 * sum(RATES), name
    with torch.no_grad():
        total = float(trainer.loss(step_batches(config, STEPS - 1))) * config.tokens_per_step
    for answer in answers:
        assert float(answer["sums"].sum()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_the_oracle(layout: str, pool: RankPool) -> None:
    parallel, model = LAYOUTS[layout]
    check_training(pool, parallel, model, micro_batch_size(parallel))


OBJECTIVES: dict[str, dict[str, Any]] = {
    "autoregressive": {"name": "autoregressive"},
    "cosine, subs": {"name": "masked", "schedule": "cosine", "subs": True},
    "discrete steps": {"name": "discrete_steps", "steps": 10},
}
"""Those that are not in all layouts above."""


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", ["TP2+SP x DP4", "PP2 x VP2 x DP4", "CP2 x DP4"])
def test_every_objective_equals_the_oracle(layout: str, objective: str, pool: RankPool) -> None:
    parallel, model = LAYOUTS[layout]
    check_training(pool, parallel, model, micro_batch_size(parallel), OBJECTIVES[objective])


@pytest.mark.parametrize("micro", [1, 4])
def test_accumulation_on_two_replicas_changes_nothing(micro: int, pool: RankPool) -> None:
    """Eight sequences on two replicas in four micro-batches each, or in one."""
    check_training(pool, {"tensor": 2, "sequence": True, "context": 2}, {}, micro)


def broken_steps(parallel: dict[str, Any]) -> dict[str, Any]:
    """A good step, one with nan on a single rank, one above a limit, and what they did to weights,
    moments and step counts.
    """
    config = small_config({}, parallel, batch={"global": 8, "micro": 1})
    engine = MegatronEngine(config)
    try:
        own_rank = engine.parallel_rank

        def own(step: int) -> list[Batch]:
            return step_batches(config, step)[own_rank.data_rank :: own_rank.data_size]

        def state() -> list[torch.Tensor]:
            kept = [
                value
                for part in engine._optimizers()
                for moments in part.optimizer.state.values()
                for value in moments.values()
            ]
            return [value.detach().clone() for value in [*engine.parameters().values(), *kept]]

        engine.train_step(own(0), 1e-3)
        before = state()
        batches = own(1)
        if own_rank.rank == own_rank.world_size - 1:
            batches[-1] = with_nan_weights(batches[-1])
        results = [
            engine.train_step(batches, 1e-3),
            engine.train_step(own(1), 1e-3, Limits(loss=1.0)),
            engine.train_step(own(1), 1e-3, Limits(grad_norm=1e-3)),
        ]
        same = all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
        results.append(engine.train_step(own(1), 1e-3, Limits(1e9, 1e9)))
        return {
            "applied": [result.applied for result in results],
            "same": same,
            "loss": results[-1].loss,
        }
    finally:
        engine.close()


@pytest.mark.parametrize("parallel", [NO_OVERLAP, {"tensor": 2, "pipeline": 2}])
def test_a_step_that_one_rank_cannot_take_is_left_out_by_all(
    parallel: dict[str, Any], pool: RankPool
) -> None:
    answers = pool.run(broken_steps, parallel)
    assert [answer["applied"] for answer in answers] == [[False, False, False, True]] * len(answers)
    assert all(answer["same"] for answer in answers)
    assert len({answer["loss"] for answer in answers}) == 1

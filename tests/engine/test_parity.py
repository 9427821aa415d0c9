"""The engine on one process against the plain-PyTorch oracle: logits, losses, every gradient, five
optimizer steps.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from llada.engine.megatron import MegatronEngine
from llada.objectives import TOKENS
from tests.engine.support import (
    OracleTrainer,
    canonical,
    made_engine,
    small_config,
    step_batches,
    with_nan_weights,
)

SHAPES = {
    "grouped queries": {},
    "all heads": {"num_query_groups": None},
    "one group": {"num_query_groups": 1},
    "tied head": {"tie_embeddings": True},
    "odd ffn": {"ffn_hidden_size": 101},
}


OBJECTIVES = {
    "bernoulli": {"masking": "bernoulli"},
    "fixed count": {"masking": "fixed_count"},
    "cosine, subs": {"schedule": "cosine", "subs": True},
    "discrete steps": {"name": "discrete_steps", "steps": 10},
    "autoregressive": {"name": "autoregressive"},
}
CASES = [
    *itertools.product(SHAPES, ["bernoulli", "fixed count"]),
    *itertools.product(["grouped queries"], ["cosine, subs", "discrete steps", "autoregressive"]),
]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((got - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize(("shape", "objective"), CASES)
def test_five_steps_equal_the_oracle(shape: str, objective: str) -> None:
    config = small_config(SHAPES[shape], objective=OBJECTIVES[objective])
    engine = made_engine(config)
    try:
        trainer = OracleTrainer(config, canonical(engine))
        rates = [1e-3 * (step + 1) / 10 for step in range(5)]
        for step, rate in enumerate(rates):
            batches = step_batches(config, step)
            loss, norm, grads = trainer.step(batches, rate)
            result = engine.train_step(batches, rate)
            assert result.applied
            assert result.loss == pytest.approx(loss, rel=1e-6)
            assert result.grad_norm == pytest.approx(norm, rel=1e-6)
            if step in (0, 4):
                ours = canonical(engine, "gradients")
                # in fp32 the optimizer clips main_grad in place
                scale = max(1.0, norm / config.optimizer.clip)
                wrong = [name for name in grads if not close(ours[name] * scale, grads[name], 1e-5)]
                assert not wrong
        after = canonical(engine)
        for name, expected in trainer.oracle.w.items():
            assert (after[name] - expected).abs().max() <= 0.02 * sum(rates), name
    finally:
        engine.close()


def test_nothing_masked_gives_zero_not_nan() -> None:
    config = small_config()
    engine = MegatronEngine(config)
    try:
        before = canonical(engine)
        batches = []
        for batch in step_batches(config, 0):
            terms = batch.terms[TOKENS]
            none = {
                field: getattr(terms, field)[:0]
                for field in ("rows", "columns", "targets", "weights", "groups")
            }
            batches.append(replace(batch, terms={TOKENS: replace(terms, **none)}))
        result = engine.train_step(batches, 0.0)
        assert (result.loss, result.grad_norm, result.applied) == (0.0, 0.0, True)
        assert all(torch.equal(before[name], value) for name, value in canonical(engine).items())
    finally:
        engine.close()


def test_a_step_that_is_not_finite_updates_nothing() -> None:
    config = small_config()
    engine = MegatronEngine(config)
    try:
        engine.train_step(step_batches(config, 0), 1e-3)
        before = canonical(engine)
        batches = step_batches(config, 1)
        broken = with_nan_weights(batches[2])
        result = engine.train_step([*batches[:2], broken, *batches[3:]], 1e-3)
        assert not result.applied
        assert all(torch.equal(before[name], value) for name, value in canonical(engine).items())
        assert engine.train_step(step_batches(config, 2), 1e-3).applied
    finally:
        engine.close()


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
def test_accumulation_changes_nothing(micro: int) -> None:
    """One step of 8 sequences in 8, 4, 2 or 1 micro-batches: the oracle's loss and gradients, which
    know no micro-batches.
    """
    config = small_config(batch={"global": 8, "micro": micro})
    engine = MegatronEngine(config)
    try:
        trainer = OracleTrainer(config, canonical(engine))
        loss, norm, _ = trainer.step(
            step_batches(small_config(batch={"global": 8, "micro": 8}), 3), 1e-3
        )
        result = engine.train_step(step_batches(config, 3), 1e-3)
        assert result.loss == pytest.approx(loss, rel=1e-6) and result.grad_norm == pytest.approx(
            norm, rel=1e-6
        )
    finally:
        engine.close()


def test_bf16_keeps_master_weights_and_follows_fp32() -> None:
    """Losses agree to bf16 rounding (2^-9 relative a product), and updates below bf16's resolution
    are not lost.
    """
    losses = {}
    for precision in ("fp32", "bf16"):
        engine = MegatronEngine(small_config(precision=precision))
        try:
            losses[precision] = [
                engine.train_step(step_batches(engine.config, step), 1e-5).loss for step in range(4)
            ]
            if precision == "bf16":
                assert {p.dtype for p in engine.parameters().values()} == {torch.bfloat16}
                masters = [p for group in engine.optimizer.param_groups for p in group["params"]]
                assert {p.dtype for p in masters} == {torch.float32}
                assert any((p != p.bfloat16().float()).any() for p in masters)
                assert {p.main_grad.dtype for p in engine.parameters().values()} == {torch.float32}
        finally:
            engine.close()
    assert losses["bf16"] == [pytest.approx(loss, rel=1e-2) for loss in losses["fp32"]]

"""The model in the engine: logits, what reaches what, parameter groups, per-segment sums. One
engine for the whole file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from llada.engine.megatron import MegatronEngine
from llada.model.attention import attention_inputs
from llada.objectives import TOKENS, Layout
from tests.engine.support import OracleTrainer, canonical, segment_ids, small_config, step_batches


@pytest.fixture(scope="module")
def engine() -> Iterator[MegatronEngine]:
    made = MegatronEngine(small_config())
    yield made
    made.close()


def test_logits_equal_the_oracle(engine: MegatronEngine) -> None:
    batch = step_batches(engine.config, 0)[0]
    expected = OracleTrainer(engine.config, canonical(engine)).oracle(
        batch.inputs, segment_ids(batch)
    )
    got = engine.logits(batch)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def input_gradient(engine: MegatronEngine, bounds: tuple[int, ...], position: int) -> torch.Tensor:
    """|d logits at `position` / d embedding of each token|, through the real model, one row."""
    config = engine.config
    batch = step_batches(small_config(batch={"global": 1, "micro": 1}), 0)[0]
    batch = replace(batch, layout=Layout((bounds,), config.data.sequence_length))
    chunk = engine.chunks[0]
    kept: list[torch.Tensor] = []
    hook = chunk.embedding.register_forward_hook(
        lambda module, args, out: kept.append(out.requires_grad_()) or out
    )
    try:
        attention = attention_inputs(
            batch.layout, batch.positions, 0, config.model.head_dim, config.model.rope_theta, None
        )
        logits = chunk(batch.inputs, attention)
        (gradient,) = torch.autograd.grad(logits[position].square().sum(), kept[0])
    finally:
        hook.remove()
    return gradient[:, 0].norm(dim=-1)


def test_later_tokens_reach_earlier_ones_and_back(engine: MegatronEngine) -> None:
    """A causal layer would leave one of the two at zero."""
    assert (input_gradient(engine, (0, 32), 0)[1:] > 0).all()
    assert (input_gradient(engine, (0, 32), 31)[:-1] > 0).all()


@pytest.mark.parametrize("position", [0, 9, 10, 24, 25, 31])
def test_a_document_never_reaches_another(engine: MegatronEngine, position: int) -> None:
    bounds = (0, 10, 25, 32)
    reached = input_gradient(engine, bounds, position) > 0
    start, end = next((a, b) for a, b in itertools.pairwise(bounds) if a <= position < b)
    assert reached[start:end].all()
    assert not reached[:start].any() and not reached[end:].any()


def test_weight_decay_is_for_matrices_only(engine: MegatronEngine) -> None:
    mult = {}
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            mult[parameter.numel()] = group["wd_mult"]
    norms, matrices = mult.pop(64), set(mult.values())
    assert norms == 0.0 and matrices == {1.0}


def test_evaluate_gives_the_sum_of_every_noise_group(engine: MegatronEngine) -> None:
    config = engine.config
    batches = step_batches(config, 7)
    trainer = OracleTrainer(config, canonical(engine))
    count = 1 + max(int(b.terms[TOKENS].groups.max()) for b in batches)
    sums = engine.evaluate(batches, count)
    expected = torch.zeros(count, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            terms = batch.terms[TOKENS]
            logits = trainer.oracle(batch.inputs, segment_ids(batch))[terms.rows, terms.columns]
            losses = torch.nn.functional.cross_entropy(logits, terms.targets, reduction="none")
            expected.index_add_(0, terms.groups, (losses * terms.weights).double())
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-6)

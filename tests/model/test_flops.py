"""FLOP counts against torch's own counter on a plain model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llada.config.sections import ModelSection
from llada.model.flops import Peak, step_flops
from llada.model.weights import canonical_shapes, num_parameters
from llada.objectives import TOKENS, Work
from tests.model.oracle import Oracle

MODEL = ModelSection(
    num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=96, vocab_size=128
)


def work(lengths: list[int], predicted: int) -> Work:
    return Work(sum(lengths), {TOKENS: predicted}, sum(length**2 for length in lengths))


def test_full_length_equals_torchs_counter() -> None:
    oracle = Oracle(
        MODEL, {name: torch.randn(shape) for name, shape in canonical_shapes(MODEL).items()}
    )
    tokens = torch.randint(0, 128, (3, 32))
    with FlopCounterMode(display=False) as counter:
        logits = oracle(tokens, torch.zeros_like(tokens))
        logits.sum().backward()
    flops = step_flops(MODEL, work([32, 32, 32], 96), 32)
    assert flops.full_length == flops.actual
    # The rotary tables are elementwise; every matrix product is counted, and nothing flows back
    # into the token ids.
    assert flops.actual == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_segments_cost_less_attention_and_fewer_predictions_less_head() -> None:
    whole = step_flops(MODEL, work([64], 64), 64)
    cut = step_flops(MODEL, work([32, 32], 64), 64)
    assert whole.actual - cut.actual == 3 * 4 * 2 * 64 * (64**2 - 2 * 32**2)
    assert cut.full_length == whole.full_length
    fewer = step_flops(MODEL, work([64], 24), 64)
    assert whole.actual - fewer.actual == 3 * 2 * 64 * 128 * 40


def test_grouped_queries_cost_less() -> None:
    grouped = MODEL.model_copy(update={"num_query_groups": 1})
    no_head = work([64], 0)
    ungrouped = step_flops(MODEL, no_head, 64)
    saved = ungrouped.actual - step_flops(grouped, no_head, 64).actual
    assert saved == 3 * 2 * 2 * 64 * 64 * 2 * (64 - 16)


def test_parameters_of_the_published_models() -> None:
    """1,487,243,264 and 8,015,581,184 parameters; 969,246,720 and 6,979,588,096 without embedding
    and head.
    """
    small = ModelSection(
        num_layers=22,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=4,
        ffn_hidden_size=5634,
        vocab_size=126464,
    )
    large = ModelSection(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        ffn_hidden_size=12288,
        vocab_size=126464,
    )
    assert [num_parameters(small), num_parameters(small, embedding=False)] == [
        1_487_243_264,
        969_246_720,
    ]
    assert [num_parameters(large), num_parameters(large, embedding=False)] == [
        8_015_581_184,
        6_979_588_096,
    ]


def test_the_peak_on_cpu_is_measured_and_never_below_what_a_step_reaches() -> None:
    """A peak measured beside other work gave an MFU of 142 %."""
    peak = Peak(torch.device("cpu"), torch.float32)
    measured = peak.flops
    assert measured > 1e9 and peak.source == "measured matrix product"
    assert peak.mfu(measured / 2) == 0.5 and peak.flops == measured
    assert peak.mfu(1e3 * measured) == 1.0 and peak.flops == 1e3 * measured
    peak.flops = 1.0
    peak.refresh(share=1.0)
    assert peak.flops > 1e9  # too low a figure does not stay

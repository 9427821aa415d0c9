"""Samplers against a plain re-implementation of the published algorithm."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.errors import UserError
from llada.sampling.diffusion import (
    DenoisingStep,
    SamplingOptions,
    SpecialIds,
    cut_at_end,
    generate,
    infill,
    quotas,
)

ROWS, VOCAB, MASK, EOS = 40, 36, 34, 3
SPECIALS = SpecialIds(MASK, EOS, VOCAB)


class Toy:
    """A fixed bidirectional model: logits of a position depend on all tokens of its row and their
    distance. Masks and padding rows get large logits, as an untrained head may give them.
    """

    def __init__(self, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(ROWS, 16, generator=rng)
        self.head = torch.randn(16, ROWS, generator=rng)
        self.calls = 0

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.embedding[tokens]
        s = tokens.shape[1]
        near = torch.exp(-0.3 * (torch.arange(s)[:, None] - torch.arange(s)).abs())
        hidden = torch.tanh(near @ x + 0.1 * torch.arange(s)[:, None] * x.mean(1, keepdim=True))
        logits = hidden @ self.head
        logits[..., MASK] += 3.0
        logits[..., VOCAB:] += 2.0
        return logits


def published(
    model: Any, prompt: torch.Tensor, steps: int, length: int, block: int, w: float
) -> torch.Tensor:
    """Low-confidence remasking at temperature 0 for one row, position by position. [MASK] and
    padding rows are not written.
    """
    x = torch.cat([prompt, torch.full((length,), MASK)])
    p = len(prompt)
    blocks = length // block
    for b in range(blocks):
        first, last = p + b * block, p + (b + 1) * block
        masks = block
        per_step = [masks // (steps // blocks)] * (steps // blocks)
        for i in range(masks % (steps // blocks)):
            per_step[i] += 1
        for count in per_step:
            logits = model(x[None])[0].double()
            if w > 0:
                hidden = x.clone()
                hidden[:p] = MASK
                unconditional = model(hidden[None])[0].double()
                logits = unconditional + (w + 1) * (logits - unconditional)
            probabilities = torch.softmax(logits, -1)
            ranked = []
            for i in range(first, last):
                if x[i] == MASK:
                    allowed = [k for k in range(VOCAB) if k != MASK]
                    best = max(allowed, key=lambda k, i=i: float(logits[i, k]))
                    ranked.append((-float(probabilities[i, best]), i, best))
            for _, i, best in sorted(ranked)[:count]:
                x[i] = best
    return x[p:]


@pytest.mark.parametrize(
    ("length", "steps", "block"),
    [(12, 12, 12), (12, 5, 12), (12, 1, 12), (12, 6, 4), (12, 9, 4), (16, 4, 4), (8, 32, 8)],
)
@pytest.mark.parametrize("w", [0.0, 1.5])
def test_the_same_tokens_as_the_published_algorithm(
    length: int, steps: int, block: int, w: float
) -> None:
    for seed in range(4):
        model = Toy(seed)
        prompts = torch.randint(0, MASK, (3, 5), generator=torch.Generator().manual_seed(seed))
        options = SamplingOptions(length, steps, block, cfg=w)
        result = generate(model, prompts, SPECIALS, options)
        for row in range(3):
            assert (
                result[row].tolist()
                == published(model, prompts[row], steps, length, block, w).tolist()
            )


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(1, 300))
def test_quotas(masks: int, steps: int) -> None:
    result = quotas(masks, steps)
    assert sum(result) == masks
    assert len(result) == steps
    assert result == sorted(result, reverse=True)
    assert max(result) - min(result) <= 1


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_impossible_is_written_and_blocks_go_from_left_to_right(
    remasking: str, temperature: float
) -> None:
    steps_taken: list[DenoisingStep] = []
    prompt = torch.randint(0, MASK, (2, 4))
    options = SamplingOptions(12, 6, 4, temperature, remasking=remasking, seed=1)
    model = Toy()
    out = generate(model, prompt, SPECIALS, options, steps_taken.append)
    assert ((out < VOCAB) & (out != MASK)).all()
    assert [step.number for step in steps_taken] == list(range(1, 7))
    assert model.calls == 6
    written = torch.zeros(2, 16, dtype=torch.bool)
    for step in steps_taken:
        block = (step.number - 1) // 2
        columns = step.committed.nonzero()[:, 1]
        assert ((columns >= 4 + 4 * block) & (columns < 8 + 4 * block)).all()
        assert step.committed.sum(1).tolist() == [2, 2]
        assert not (written & step.committed).any()
        written |= step.committed
        assert (step.tokens[:, :4] == prompt).all()
        assert ((step.tokens == MASK) == ~written)[:, 4:].all()
    assert torch.equal(steps_taken[-1].tokens[:, 4:], out)


def test_temperature_samples_the_softmax() -> None:
    """One mask, many rows and seeds: frequencies within four standard errors of softmax(logits / T)
    over what may be written.
    """
    logits = torch.linspace(-1, 2, ROWS)
    prompts = torch.zeros(100, 1, dtype=torch.long)
    options = [SamplingOptions(1, 1, temperature=0.7, seed=seed) for seed in range(40)]

    def model(tokens: torch.Tensor) -> torch.Tensor:
        return logits.expand(*tokens.shape, ROWS)

    counts: Counter[int] = Counter()
    for option in options:
        counts.update(generate(model, prompts, SPECIALS, option).flatten().tolist())
    draws = counts.total()
    assert draws == 4000
    allowed = [k for k in range(VOCAB) if k != MASK]
    expected = torch.softmax(logits[allowed].double() / 0.7, -1).numpy()
    result = np.array([counts[k] for k in allowed]) / draws
    assert counts[MASK] == 0
    assert (
        np.abs(result - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws) + 1e-9
    ).all()


def test_random_remasking_chooses_uniformly() -> None:
    firsts: Counter[int] = Counter()
    for seed in range(15):
        steps_taken: list[DenoisingStep] = []
        options = SamplingOptions(6, 6, remasking="random", seed=seed)
        prompts = torch.zeros(100, 1, dtype=torch.long)
        generate(Toy(), prompts, SPECIALS, options, steps_taken.append)
        rows, first = steps_taken[0].committed.nonzero(as_tuple=True)
        assert rows.tolist() == list(range(100))  # each row commits one token
        firsts.update(first.tolist())
    assert set(firsts) == set(range(1, 7))
    assert all(
        abs(count - 250) < 4 * np.sqrt(1500 * (1 / 6) * (5 / 6)) for count in firsts.values()
    )


def test_a_row_does_not_depend_on_what_is_sampled_beside_it() -> None:
    prompt = torch.randint(0, MASK, (3, 4))
    options = SamplingOptions(8, 4, temperature=0.8, remasking="random", seed=5)
    whole = generate(Toy(), prompt, SPECIALS, options)
    assert torch.equal(whole[:1], generate(Toy(), prompt[:1], SPECIALS, options))
    assert not torch.equal(
        whole,
        generate(
            Toy(),
            prompt,
            SPECIALS,
            SamplingOptions(8, 4, temperature=0.8, remasking="random", seed=6),
        ),
    )


def test_infilling_fills_the_gaps_and_nothing_else() -> None:
    tokens = torch.randint(0, MASK, (2, 14))
    gaps = torch.zeros(2, 14, dtype=torch.bool)
    gaps[0, [2, 3, 9]] = True
    gaps[1, [0, 13]] = True
    masked = torch.where(gaps, MASK, tokens)
    steps_taken: list[DenoisingStep] = []
    out = infill(Toy(), masked, SPECIALS, SamplingOptions(steps=2), steps_taken.append)
    assert torch.equal(out[~gaps], tokens[~gaps])
    assert (out[gaps] != MASK).all()
    assert [step.committed.sum(1).tolist() for step in steps_taken] == [[2, 1], [1, 1]]
    assert torch.equal(infill(Toy(), masked, SPECIALS, SamplingOptions(steps=2)), out)
    with pytest.raises(UserError, match=r"no \[MASK\] to fill"):
        infill(Toy(), tokens, SPECIALS, SamplingOptions())


def test_one_gap_at_the_end_is_generation() -> None:
    prompt = torch.randint(0, MASK, (1, 5))
    masked = torch.cat([prompt, torch.full((1, 6), MASK)], 1)
    out = infill(Toy(), masked, SPECIALS, SamplingOptions(steps=3, cfg=0.5))
    assert torch.equal(
        out[:, 5:], generate(Toy(), prompt, SPECIALS, SamplingOptions(6, 3, cfg=0.5))
    )


def test_a_text_is_cut_at_the_first_of_the_tokens_that_end_it() -> None:
    assert cut_at_end([5, 6, EOS, 7, EOS], {EOS}) == [5, 6]
    assert cut_at_end([5, 9, 6, EOS], {EOS, 9}) == [5]
    assert cut_at_end([5, 6], {EOS, 9}) == [5, 6]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"length": 0}, "--length: 0 is less than 1"),
        ({"steps": 0}, "--steps: 0 is less than 1"),
        ({"length": 12, "block_length": 5}, "--block-length: 5 does not divide --length 12"),
        (
            {"length": 12, "block_length": 4, "steps": 4},
            "--steps: 4 is not a multiple of the 3 blocks",
        ),
        ({"temperature": -1.0}, "--temperature: -1.0"),
        ({"cfg": float("nan")}, "--cfg: nan"),
        ({"seed": -1}, r"--seed: -1 is not from 0 to 2\^64 - 1"),
        ({"seed": 10**30}, "--seed: 10000"),
        ({"remasking": "low"}, "--remasking: 'low' is not allowed; one of low_confidence, random"),
    ],
)
def test_options_that_make_no_sense(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingOptions(**settings_)

"""The autoregressive objective against the chain rule."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from llada.objectives import TOKENS, Key, NoiseGroups, Row
from llada.objectives.autoregressive import Autoregressive

START = 9


def row(tokens: list[int], bounds: list[int], spans: list[list[int]], scales: list[float]) -> Row:
    count = len(spans)
    groups = NoiseGroups.of_whole_samples(
        np.zeros(count, dtype=np.int64), np.array(spans), np.zeros(count), np.array(scales)
    )
    return Row(np.array(tokens), np.array(bounds), groups)


def test_the_sum_of_the_losses_is_the_exact_likelihood() -> None:
    """A toy model over 3 ids and 4 positions: any table of p(token | tokens read so far).

    The probabilities of all 81 texts must add up to 1, and each must be the product of the table's
    entries along the text.
    """
    rng = np.random.default_rng(0)
    table: dict[tuple[int, ...], np.ndarray] = {}
    objective = Autoregressive(START)
    total = 0.0
    for text in itertools.product(range(3), repeat=4):
        corrupted = objective.corrupt(row(list(text), [0, 4], [[0, 4]], [1.0]), Key(0))
        terms = corrupted.terms[TOKENS]
        loss = 0.0
        for position, target, weight in zip(
            terms.positions, terms.targets, terms.weights, strict=True
        ):
            # A causal model has read the inputs up to the position itself.
            read = tuple(corrupted.inputs[: position + 1].tolist())
            loss -= weight * math.log(table.setdefault(read, rng.dirichlet(np.ones(3)))[target])
        chain = math.prod(table[(START, *text[:i])][text[i]] for i in range(4))
        assert math.exp(-loss) == pytest.approx(chain, rel=1e-12)
        total += math.exp(-loss)
    assert total == pytest.approx(1, abs=1e-12)


def test_segments_start_anew_and_only_groups_are_predicted() -> None:
    """A conversation with a prompt of two tokens, and one with a prompt of one.

    They are groups 20 and 21 of the step.
    """
    objective = Autoregressive(START)
    whole = row([1, 2, 3, 4, 5, 6, 7], [0, 5, 7], [[2, 5], [6, 7]], [0.25, 0.5])
    whole = replace(whole, groups=replace(whole.groups, ids=np.array([20, 21])))
    corrupted = objective.corrupt(whole, Key(0))
    assert corrupted.inputs.tolist() == [START, 1, 2, 3, 4, START, 6]
    assert corrupted.layout.rule == "causal" and corrupted.layout.bounds == ((0, 5, 7),)
    terms = corrupted.terms[TOKENS]
    assert terms.positions.tolist() == [2, 3, 4, 6] and terms.targets.tolist() == [3, 4, 5, 7]
    assert terms.weights.tolist() == [0.25] * 3 + [0.5]
    assert terms.groups.tolist() == [20] * 3 + [21]


def test_a_segment_that_begins_with_the_start_token_is_read_as_it_is() -> None:
    """As conversations do, unless the start token is itself to be predicted."""
    objective = Autoregressive(START)
    tokens = [START, 2, 3, 4, START, 6, START, 8]
    spans = [[2, 4], [5, 6], [6, 8]]
    corrupted = objective.corrupt(row(tokens, [0, 4, 6, 8], spans, [1.0, 1.0, 1.0]), Key(0))
    assert corrupted.inputs.tolist() == [START, 2, 3, 4, START, 6, START, START]
    terms = corrupted.terms[TOKENS]
    assert terms.targets.tolist() == [3, 4, 6, START, 8]
    # The state that has read the token before: of the last segment's two tokens START and START.
    assert terms.positions.tolist() == [1, 2, 4, 6, 7]
    assert terms.groups.tolist() == [0, 0, 1, 2, 2]


def test_work_is_half_the_pairs_and_every_token() -> None:
    whole = row(list(range(12)), [0, 4, 12], [[0, 4], [4, 12]], [1.0, 1.0])
    work = Autoregressive(START).work(np.array([4, 8]), whole.groups)
    assert work.inputs == 12
    assert work.terms == {TOKENS: 12} and work.attended_pairs == 10 + 36

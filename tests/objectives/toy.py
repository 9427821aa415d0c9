"""A toy model of a text, small enough to list all that can be masked in it."""

from __future__ import annotations

import itertools

import numpy as np

from llada.objectives import TOKENS, Key, MaskedDiffusion, NoiseGroups, Row

L = 4
MASK = 9


def losses_of_a_toy_model() -> dict[frozenset[int], np.ndarray]:
    """An arbitrary "model" of a text of 4 tokens: the losses for every set of masked positions."""
    rng = np.random.default_rng(0)
    return {
        frozenset(s): rng.uniform(0.1, 3.0, L)
        for k in range(L + 1)
        for s in itertools.combinations(range(L), k)
    }


def exact_nelbo(model: dict[frozenset[int], np.ndarray]) -> float:
    """The NELBO from its other definition, over generation orders.

    The mean over all orders of the sum of -log p(next token | revealed tokens).
    """
    orders = list(itertools.permutations(range(L)))
    return sum(
        sum(model[frozenset(order[k:])][order[k]] for k in range(L)) for order in orders
    ) / len(orders)


def masked(
    objective: MaskedDiffusion,
    sample: int,
    tokens: np.ndarray,
    bounds: list[int],
    t: list[float] | np.ndarray,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, masked positions and their weights of a row whose segments are its noise groups."""
    corrupted = objective.corrupt(whole_segments(sample, tokens, bounds, t), Key(seed))
    terms = corrupted.terms[TOKENS]
    return corrupted.inputs, terms.positions, terms.weights


def whole_segments(
    sample: int, tokens: np.ndarray, bounds: list[int], t: list[float] | np.ndarray
) -> Row:
    """A row whose attention segments are its noise groups."""
    ends = np.array(bounds)
    spans = np.stack([ends[:-1], ends[1:]], axis=1)
    groups = NoiseGroups.of_whole_samples(np.full(len(spans), sample), spans, np.asarray(t))
    return Row(tokens, ends, groups)

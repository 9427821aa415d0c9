"""Errors of validation means against simulated corpora whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llada.evaluation.estimates import (
    CorpusLosses,
    Estimate,
    noise_error,
    pooled,
    t_quantile,
    weighted,
)

CONTEXT = 2.0
"""Nats per token that a whole context saves."""


class Corpus:
    """Made-up items whose length, difficulty and dependence on t vary, and the losses that a model
    would have on them.

    Args:
        rng: of the items.
        items: how many.
        steep: whether the loss rises towards t = 1 as a power of the context that is left, and not
            linearly.
        heavy: lengths as of documents, some of which are many times longer than most; else at most
            four times.
    """

    def __init__(
        self, rng: np.random.Generator, items: int, steep: bool, heavy: bool = False
    ) -> None:
        if heavy:
            self.length = np.ceil(150 * rng.lognormal(0, 1, items)).astype(np.int64)
        else:
            self.length = rng.integers(64, 257, items)
        # Long ones are harder: a mean of ratios would be wrong.
        harder = np.minimum(self.length, 256) / 200
        self.level = 1.5 + harder + rng.normal(0, 0.5, items)
        self.slope = np.exp(rng.normal(0, 0.25, items))
        self.steep = steep

    def curve(self, t: np.ndarray) -> np.ndarray:
        return CONTEXT * ((1 - t + 0.005) ** -0.25 - 1) if self.steep else 2 * CONTEXT * t

    def truth(self) -> float:
        """NELBO per token of these items, without noise."""
        t = (np.arange(20000) + 0.5) / 20000
        return float(
            (self.length * (self.level + self.slope * self.curve(t).mean())).sum()
            / self.length.sum()
        )

    def read(self, rng: np.random.Generator, sweeps: int) -> CorpusLosses:
        """Every item in so many sweeps of four draws."""
        k = len(self.length)
        t = (
            rng.random((k, 1, 1)) + np.arange(4) / 4 + np.arange(sweeps)[:, None] / (4 * sweeps)
        ) % 1.0
        t = np.sort(t, axis=2).reshape(-1, 4)
        item = np.repeat(np.arange(k), sweeps)
        length = self.length[item]
        masked = 1 + np.floor(t * length[:, None])
        noise = (
            rng.normal(size=t.shape)
            * 2.5
            / np.sqrt(masked)
            * np.sqrt(1 - masked / (length[:, None] + 1))
        )
        loss = length[:, None] * (
            self.level[item, None] + self.slope[item, None] * self.curve(t) + noise
        )
        return CorpusLosses(loss, length, item, item)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(
    ("items", "sweeps", "repetitions"),
    [(9, 1, 2000), (9, 7, 1500), (40, 1, 1500), (200, 1, 1000), (1000, 1, 500)],
)
def test_intervals_cover_the_truth(items: int, sweeps: int, repetitions: int, heavy: bool) -> None:
    """In 95 % of all validations, each on other items, the interval holds the ratio over all items
    there could be.
    """
    rng = np.random.default_rng(items + sweeps)
    truth = Corpus(np.random.default_rng(1), 400_000, steep=True, heavy=heavy).truth()
    inside = 0
    for _ in range(repetitions):
        corpus = Corpus(rng, items, steep=True, heavy=heavy)
        interval = corpus.read(rng, sweeps).estimate().interval()
        assert interval is not None
        inside += interval[0] <= truth <= interval[1]
    assert 0.93 <= inside / repetitions <= 0.97


@pytest.mark.parametrize("steep", [False, True])
@pytest.mark.parametrize(("items", "sweeps"), [(30, 1), (200, 1), (12, 4)])
def test_the_error_of_noise_is_the_spread_of_the_same_items_under_other_noise(
    items: int, sweeps: int, steep: bool
) -> None:
    rng = np.random.default_rng(items)
    corpus = Corpus(rng, items, steep)
    samples = [corpus.read(rng, sweeps) for _ in range(600)]
    spread = np.std([pooled(*sample.by_item())[0] for sample in samples])
    error = np.sqrt(np.mean([noise_error(sample) ** 2 for sample in samples]))
    assert error / spread == pytest.approx(1, abs=0.12)
    # What the draws of an item scatter is mostly their dependence on t, which the even spacing
    # averages out.
    total = 4 * samples[0].length.sum()
    naive = (
        np.sqrt(np.mean([4 * sample.loss.var(axis=1, ddof=1).sum() for sample in samples])) / total
    )
    assert naive > 1.25 * spread


def test_the_standard_error_is_the_formula() -> None:
    loss, length = np.array([3.0, 10.0, 8.0]), np.array([1.0, 4.0, 5.0])
    mean, se = pooled(loss, length)
    assert mean == pytest.approx(2.1)
    without = [(21 - loss[i]) / (10 - length[i]) for i in range(3)]
    assert se == pytest.approx(math.sqrt(2 / 3 * sum((ratio - 2.1) ** 2 for ratio in without)))
    assert pooled(loss[:1], length[:1]) == (3.0, None)
    # Of items of equal length: the error of a mean.
    of_equal_length = pooled(loss, np.full(3, 2.0))[1]
    assert of_equal_length == pytest.approx(loss.std(ddof=1) / math.sqrt(3) / 2)


def test_items_are_summed_over_their_sweeps() -> None:
    loss = np.arange(12.0).reshape(3, 4)
    sample = CorpusLosses(loss, np.array([2, 3, 5]), np.array([0, 1, 0]), np.arange(3))
    sums = sample.by_item()
    assert sums[0].tolist() == [6 + 38, 22] and sums[1].tolist() == [4 * 7, 4 * 3]
    estimate = sample.estimate()
    assert (estimate.mean, estimate.se) == pooled(*sums) and estimate.degrees == 1
    even = CorpusLosses(np.ones((3, 4)), np.array([2, 2, 2]), np.arange(3), np.arange(3))
    assert even.estimate().degrees == pytest.approx(2)


def test_a_single_item_has_no_error() -> None:
    estimate = CorpusLosses(np.ones((1, 4)), np.array([4]), np.array([0]), np.array([0])).estimate()
    assert estimate == Estimate(0.25, None, None, 1)
    assert estimate.interval() is None and estimate.scaled(2).mean == 0.5
    assert weighted([estimate, Estimate(1.0, 0.1, 0.1, 5)], [1, 1]) == Estimate(
        0.625, None, None, 1
    )


@pytest.mark.parametrize(
    ("level", "degrees", "known"),
    [
        (0.95, 1, 12.7062),
        (0.95, 8, 2.3060),
        (0.95, 30, 2.0423),
        (0.99, 4, 4.6041),
        (0.95, 1e6, 1.95997),
        (0.68, 2.5, math.nan),
    ],
)
def test_quantiles_of_student(level: float, degrees: float, known: float) -> None:
    """Of the usual tables; the last against a numerical integral of the density."""
    quantile = t_quantile(level, degrees)
    if degrees == 2.5:
        x = np.linspace(-quantile, quantile, 200_001)
        scale = math.gamma(1.75) / (math.sqrt(2.5 * math.pi) * math.gamma(1.25))
        assert np.trapezoid(scale * (1 + x**2 / 2.5) ** -1.75, x) == pytest.approx(level, rel=1e-6)
    else:
        assert quantile == pytest.approx(known, rel=3e-5)


def test_means_over_corpora_combine_independent_errors() -> None:
    estimate = weighted([Estimate(2.0, 0.3, 0.1, 10), Estimate(4.0, 0.4, 0.2, 20)], [3, 1])
    assert estimate.mean == pytest.approx(2.5)
    assert estimate.se == pytest.approx(
        math.hypot(0.225, 0.1)
    ) and estimate.se_noise == pytest.approx(math.hypot(0.075, 0.05))
    assert estimate.degrees == pytest.approx(estimate.se**4 / (0.225**4 / 10 + 0.1**4 / 20))

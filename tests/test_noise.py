"""Keyed randomness: pure functions of their keys, uniform, stratified, and tied to nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada import noise


def test_streams_do_not_depend_on_what_was_drawn_before() -> None:
    first = noise.mask_uniforms(3, 17, 64)
    noise.mask_uniforms(3, 18, 1000)
    np.testing.assert_array_equal(first, noise.mask_uniforms(3, 17, 64))
    np.testing.assert_array_equal(first[:20], noise.mask_uniforms(3, 17, 20))


def test_streams_of_different_keys_differ() -> None:
    draws = [
        noise.mask_uniforms(seed, sample, 32, purpose)
        for seed in (0, 1)
        for sample in (0, 1)
        for purpose in ("train", "validation")
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws)


def test_raw_philox_words_are_those_of_the_published_algorithm() -> None:
    """Philox-4x64-10 from its definition (Salmon et al.), in Python integers."""
    mask = 2**64 - 1
    m0 = 0xD2E7470EE14C6C93  # multipliers
    m1 = 0xCA5A826395121157
    w0 = 0x9E3779B97F4A7C15  # increments of the key
    w1 = 0xBB67AE8584CAA73B
    c = [1, 5, 0, 0]  # the counter, which numpy increments before the first draw
    k = [7, noise.purpose_key("x")]
    for round_ in range(10):
        if round_:
            k = [(k[0] + w0) & mask, (k[1] + w1) & mask]
        p0 = m0 * c[0]
        p1 = m1 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k[0], p1 & mask, (p0 >> 64) ^ c[3] ^ k[1], p0 & mask]
    assert noise.stream(7, "x", 5).random_raw(4).tolist() == c


@pytest.mark.parametrize("mode", ["stratified", "iid"])
def test_t_is_uniform_and_distinct(mode: str) -> None:
    steps = [noise.timesteps(0, step, np.full(50, 128.0), mode) for step in range(400)]
    pooled = np.sort(np.concatenate(steps))
    grid = (np.arange(len(pooled)) + 0.5) / len(pooled)
    assert np.abs(pooled - grid).max() < 1.63 / np.sqrt(len(pooled))  # Kolmogorov-Smirnov at 1 %
    assert all(len(np.unique(t)) == 50 for t in steps)
    assert pooled.min() >= 0 and pooled.max() < 1


def test_stratified_t_has_one_value_in_each_stratum() -> None:
    for step in range(20):
        t = noise.timesteps(1, step, np.full(64, 256.0), "stratified")
        gaps = np.diff(np.sort(t))
        np.testing.assert_allclose(gaps, 1 / 64, atol=1e-12)


def test_strata_are_as_wide_as_the_segments_share() -> None:
    shares = np.array([100.0, 300.0, 600.0])
    t = noise.timesteps(1, 0, shares, "stratified")
    # The first word of the stream is the offset u, the next three are the sort keys.
    order = np.argsort(noise.stream(1, "train/t-stratified", 0).random_raw(4)[1:], kind="stable")
    middles = np.cumsum(shares[order]) - shares[order] / 2
    distance = (t[order] - middles / 1000) % 1
    np.testing.assert_allclose(distance, distance[0], atol=1e-12)


@pytest.mark.parametrize("mode", ["stratified", "iid"])
def test_t_does_not_correlate_with_the_index_in_the_batch(mode: str) -> None:
    """A fixed order of strata would correlate within a step, sorted blocks over the steps."""
    index = np.arange(64)
    correlations = [
        np.corrcoef(index, noise.timesteps(2, step, np.full(64, 1.0), mode))[0, 1]
        for step in range(300)
    ]
    assert abs(np.mean(correlations)) < 4 / np.sqrt(300 * 64)
    mean_by_index = np.mean(
        [noise.timesteps(2, step, np.full(64, 1.0), mode) for step in range(300)], axis=0
    )
    assert np.abs(mean_by_index - 0.5).max() < 5 / np.sqrt(12 * 300)


def test_stratification_cuts_the_variance_of_a_loss_that_depends_on_t_alone() -> None:
    """A toy loss of n/L per token under fixed-count masking, in steps of 64 equal segments."""
    length = 128

    def step_losses(mode: str) -> np.ndarray:
        t = np.array(
            [noise.timesteps(5, step, np.full(64, float(length)), mode) for step in range(400)]
        )
        return ((1 + np.floor(t * length)) / length).mean(axis=1)

    assert step_losses("stratified").var() <= step_losses("iid").var() / 20


def test_random_lengths_have_the_right_share_and_are_uniform() -> None:
    samples = np.arange(400_000)
    r = noise.random_lengths(0, samples, 256, 0.01)
    cut = r[r < 256]
    share = 0.01 * 255 / 256
    assert abs(len(cut) / len(samples) - share) < 4 * np.sqrt(share / len(samples))
    counts = np.bincount(cut, minlength=257)[1:256]
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi2 < 255 + 4 * np.sqrt(2 * 255)
    assert r.min() >= 1 and r.max() == 256
    np.testing.assert_array_equal(
        r[1234:1300], noise.random_lengths(0, samples[1234:1300], 256, 0.01)
    )


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n: int, key: int) -> None:
    values = noise.permute(np.arange(n), n, key)
    np.testing.assert_array_equal(np.sort(values), np.arange(n))
    assert int(noise.permute(n - 1, n, key)) == values[-1]


def test_permute_is_spread_and_keyed() -> None:
    n = 10_000
    one, two = noise.permute(np.arange(n), n, 1), noise.permute(np.arange(n), n, 2)
    assert (one == two).mean() < 5 / n + 0.001
    assert abs(np.corrcoef(np.arange(n), one)[0, 1]) < 4 / np.sqrt(n)
    # The first tenth of the order must visit every tenth of the corpus evenly.
    counts = np.bincount(one[: n // 10] * 10 // n, minlength=10)
    assert ((counts - 100) ** 2 / 100).sum() < 9 + 4 * np.sqrt(18)


def test_permute_of_a_trillion_windows_needs_no_table() -> None:
    n = 10**12 + 39
    values = noise.permute(np.arange(1000) * 10**9, n, 7)
    assert len(np.unique(values)) == 1000 and values.min() >= 0 and values.max() < n


def test_neighbours_in_the_batch_are_not_neighbours_in_t() -> None:
    """The segments are laid end to end in a new order each step."""
    n, steps = 16, 300
    t = np.stack([noise.timesteps(3, step, np.ones(n), "stratified") for step in range(steps)])
    gaps = (t[:, 1:] - t[:, :-1]) % 1.0
    assert abs(float((np.abs(gaps - 1 / n) < 1e-9).mean()) - 1 / (n - 1)) < 4 * np.sqrt(
        (1 / 15) * (14 / 15) / gaps.size
    )
    order = np.argsort(t, axis=1)
    cycles = {tuple(np.roll(row, -int(np.flatnonzero(row == 0)[0])).tolist()) for row in order}
    assert len(cycles) == steps

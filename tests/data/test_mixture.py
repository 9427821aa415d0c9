"""The mixture against a plain walk over the samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.config import SHUFFLE_BLOCK
from llada.data.mixture import Mixture, Source, quotas_of
from llada.errors import UserError


def source(name: str, windows: int, weight: float = 1.0, cap: int | None = None) -> Source:
    return Source(name, f"data-{name}", windows, weight, cap)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_quotas_add_up_and_stay_within_one_of_the_share(weights: list[float]) -> None:
    quotas = quotas_of(weights)
    assert quotas.sum() == SHUFFLE_BLOCK
    assert np.abs(quotas - np.array(weights) / sum(weights) * SHUFFLE_BLOCK).max() < 1


def test_every_block_has_the_exact_quotas_and_no_window_is_skipped_or_repeated_within_an_epoch() -> None:
    mixture = Mixture([source("a", 7001, 0.7), source("b", 911, 0.3)], seed=3)
    read: list[list[int]] = [[], []]
    for block in range(4):
        found = [mixture.locate(sample) for sample in range(block * SHUFFLE_BLOCK, (block + 1) * SHUFFLE_BLOCK)]
        assert [sum(1 for s, _ in found if s == i) for i in (0, 1)] == [7000, 3000]
        for i, window in found:
            read[i].append(window)
    for i, windows in enumerate((7001, 911)):
        epochs = [read[i][k : k + windows] for k in range(0, len(read[i]) - windows + 1, windows)]
        assert epochs and all(sorted(epoch) == list(range(windows)) for epoch in epochs)
        if len(epochs) > 1:
            assert epochs[0] != epochs[1]


def test_the_order_within_a_block_mixes_the_corpora() -> None:
    mixture = Mixture([source("a", 10**6), source("b", 10**6)], seed=3)
    slots = np.array([mixture.position(sample)[0] for sample in range(SHUFFLE_BLOCK)])
    runs = 1 + (np.diff(slots) != 0).sum()
    assert abs(runs - SHUFFLE_BLOCK / 2) < 5 * np.sqrt(SHUFFLE_BLOCK) / 2


def test_a_capped_corpus_is_read_to_its_cap_and_its_quota_goes_to_the_others_by_weight() -> None:
    mixture = Mixture([source("a", 5000, 0.5, cap=12_000), source("b", 10**6, 0.3), source("c", 10**6, 0.2)], seed=0)
    assert [stage.first_block for stage in mixture.stages] == [0, 2, 3]
    assert [stage.quotas.tolist() for stage in mixture.stages] == [[5000, 3000, 2000], [2000, 4800, 3200], [0, 6000, 4000]]
    positions: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for sample in range(4 * SHUFFLE_BLOCK):
        i, position = mixture.position(sample)
        positions[i].append(position)
    assert [sorted(p) for p in positions.values()] == [list(range(12_000)), list(range(16_800)), list(range(11_200))]
    assert mixture.num_samples is None


def test_a_mixture_of_capped_corpora_ends_when_all_are_read() -> None:
    mixture = Mixture([source("a", 12_000, cap=24_000), source("b", 50_000, cap=10_001)], seed=0)
    # 5000 each a block for two blocks; then 9999 and 1; then a's last 4001.
    assert [stage.quotas.tolist() for stage in mixture.stages] == [[5000, 5000], [9999, 1], [4001, 0]]
    assert mixture.num_samples == 34_001
    mixture.locate(34_000)
    with pytest.raises(IndexError, match="past the mixture's last"):
        mixture.locate(34_001)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 25_000), st.floats(0.05, 10), st.integers(1, 30_000)), min_size=1, max_size=4))
def test_every_capped_corpus_is_read_exactly_to_its_cap(rows: list[tuple[int, float, int]]) -> None:
    sources = [Source(f"s{i}", f"d{i}", windows, weight, cap) for i, (windows, weight, cap) in enumerate(rows)]
    mixture = Mixture(sources, seed=1)
    assert mixture.num_samples == sum(cap for _, _, cap in rows)
    assert mixture.stages[-1].consumed.tolist() != [cap for _, _, cap in rows]
    found = [mixture.position(sample) for sample in range(mixture.num_samples)]
    for i, (_, _, cap) in enumerate(rows):
        assert sorted(position for s, position in found if s == i) == list(range(cap))


def test_the_order_follows_the_data_not_its_path_or_place() -> None:
    here = Mixture([Source("/a/x", "f1", 500, 1.0)], seed=1)
    there = Mixture([Source("/b/y", "f1", 500, 3.0)], seed=1)
    other = Mixture([Source("/a/x", "f2", 500, 1.0)], seed=1)
    assert [here.locate(i) for i in range(100)] == [there.locate(i) for i in range(100)]
    assert [here.locate(i) for i in range(100)] != [other.locate(i) for i in range(100)]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([source("a", 10**6, 1.0), source("b", 100, 1e-6)], r"data.mixture.1.weight: 1e-06 gives b no sample"),
        ([source("a", 0)], r"data.mixture.0.path: a holds no full window"),
        ([source("a", 9, cap=0)], r"data.mixture.0.max_epochs: less than one of the 9 windows"),
        ([Source("a", "f", 9, 1.0), Source("b", "f", 9, 1.0)], r"data.mixture.1.path: b holds the same data as a"),
    ],
)
def test_refused(sources: list[Source], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(sources, seed=0)


def test_a_sample_of_a_huge_mixture_needs_no_table() -> None:
    mixture = Mixture([source("a", 5 * 10**8, 0.9), source("b", 10**8, 0.1)], seed=0)
    i, window = mixture.locate(10**10 + 7)
    assert 0 <= window < mixture.sources[i].windows

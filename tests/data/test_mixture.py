"""The mixture against a plain walk over the samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.config import SHUFFLE_BLOCK, build_config
from llada.data.mixture import Mixture, MixtureSource, quotas_of
from llada.errors import UserError


def source(name: str, windows: int, weight: float = 1.0, cap: int | None = None) -> MixtureSource:
    return MixtureSource(name, f"data-{name}", windows, weight, cap)


def locate(mixture: Mixture, sample: int) -> tuple[int, int]:
    """Corpus and window of one sample."""
    corpora, windows = mixture.lookup(np.array([sample]))
    return int(corpora[0]), int(windows[0])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_quotas_add_up_and_stay_within_one_of_the_share(weights: list[float]) -> None:
    quotas = quotas_of(weights)
    assert quotas.sum() == SHUFFLE_BLOCK
    assert np.abs(quotas - np.array(weights) / sum(weights) * SHUFFLE_BLOCK).max() < 1


def test_blocks_have_exact_quotas_and_no_window_is_skipped_or_repeated_within_an_epoch() -> None:
    mixture = Mixture([source("a", 7001, 0.7), source("b", 911, 0.3)], seed=3)
    read: list[list[int]] = [[], []]
    for block in range(4):
        samples = np.arange(block * SHUFFLE_BLOCK, (block + 1) * SHUFFLE_BLOCK)
        rows = list(zip(*(column.tolist() for column in mixture.lookup(samples)), strict=True))
        assert rows[:9] == [locate(mixture, sample) for sample in samples[:9].tolist()]
        assert [sum(1 for s, _ in rows if s == i) for i in (0, 1)] == [7000, 3000]
        for i, window in rows:
            read[i].append(window)
    for i, windows in enumerate((7001, 911)):
        epochs = [read[i][k : k + windows] for k in range(0, len(read[i]) - windows + 1, windows)]
        assert epochs and all(sorted(epoch) == list(range(windows)) for epoch in epochs)
        if len(epochs) > 1:
            assert epochs[0] != epochs[1]


def test_the_order_within_a_block_mixes_the_corpora() -> None:
    mixture = Mixture([source("a", 10**6), source("b", 10**6)], seed=3)
    slots, _ = mixture.stream_positions(np.arange(SHUFFLE_BLOCK))
    runs = 1 + (np.diff(slots) != 0).sum()
    assert abs(runs - SHUFFLE_BLOCK / 2) < 5 * np.sqrt(SHUFFLE_BLOCK) / 2


def test_a_capped_corpus_is_read_to_its_cap_and_its_quota_goes_to_the_others_by_weight() -> None:
    mixture = Mixture(
        [source("a", 5000, 0.5, cap=12_000), source("b", 10**6, 0.3), source("c", 10**6, 0.2)],
        seed=0,
    )
    assert [stage.first_block for stage in mixture.stages] == [0, 2, 3]
    assert [stage.quotas.tolist() for stage in mixture.stages] == [
        [5000, 3000, 2000],
        [2000, 4800, 3200],
        [0, 6000, 4000],
    ]
    corpora, positions = mixture.stream_positions(np.arange(4 * SHUFFLE_BLOCK))
    for i, count in enumerate((12_000, 16_800, 11_200)):
        np.testing.assert_array_equal(np.sort(positions[corpora == i]), np.arange(count))
    assert mixture.num_samples is None


def test_what_a_run_reads_of_each_corpus_is_known_before_it_starts() -> None:
    mixture = Mixture(
        [
            source("a", 5000, 0.5, cap=12_000),
            source("b", 10**6, 0.3),
            source("c", 10**6, 0.2, cap=900_000),
        ],
        seed=0,
    )
    for samples in (0, 7, 12_345, 3 * SHUFFLE_BLOCK, 3 * SHUFFLE_BLOCK + 1):
        corpora, _ = mixture.stream_positions(np.arange(samples))
        assert mixture.consumed(samples).tolist() == [int((corpora == i).sum()) for i in range(3)]
    assert mixture.exhausted_after(0) == 3 * SHUFFLE_BLOCK and mixture.exhausted_after(1) is None
    whole = Mixture([source("a", 30, cap=60)], seed=0)
    assert whole.exhausted_after(0) == whole.num_samples == 60 and whole.consumed(60).tolist() == [
        60
    ]


def test_a_mixture_of_capped_corpora_ends_when_all_are_read() -> None:
    mixture = Mixture([source("a", 12_000, cap=24_000), source("b", 50_000, cap=10_001)], seed=0)
    # 5000 each a block for two blocks; then 9999 and 1; then a's last 4001.
    assert [stage.quotas.tolist() for stage in mixture.stages] == [
        [5000, 5000],
        [9999, 1],
        [4001, 0],
    ]
    assert mixture.num_samples == 34_001
    locate(mixture, 34_000)
    with pytest.raises(IndexError, match="past the mixture's last"):
        locate(mixture, 34_001)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 25_000), st.floats(0.05, 10), st.integers(1, 30_000)),
        min_size=1,
        max_size=4,
    )
)
def test_every_capped_corpus_is_read_exactly_to_its_cap(rows: list[tuple[int, float, int]]) -> None:
    sources = [
        MixtureSource(f"s{i}", f"d{i}", windows, weight, cap)
        for i, (windows, weight, cap) in enumerate(rows)
    ]
    mixture = Mixture(sources, seed=1)
    assert mixture.num_samples == sum(cap for _, _, cap in rows)
    assert mixture.stages[-1].consumed.tolist() != [cap for _, _, cap in rows]
    corpora, positions = mixture.stream_positions(np.arange(mixture.num_samples))
    for i, (_, _, cap) in enumerate(rows):
        np.testing.assert_array_equal(np.sort(positions[corpora == i]), np.arange(cap))


def test_the_order_follows_the_data_not_its_path() -> None:
    first = Mixture([MixtureSource("/a/x", "f1", 500, 1.0)], seed=1)
    same = Mixture([MixtureSource("/b/y", "f1", 500, 3.0)], seed=1)
    other = Mixture([MixtureSource("/a/x", "f2", 500, 1.0)], seed=1)
    assert [locate(first, i) for i in range(100)] == [locate(same, i) for i in range(100)]
    assert [locate(first, i) for i in range(100)] != [locate(other, i) for i in range(100)]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            [source("a", 10**6, 1.0), source("b", 100, 1e-6)],
            r"data.mixture.1.weight: 1e-06 gives b no sample",
        ),
        ([source("a", 0)], r"data.mixture.0.path: a contains no full window"),
        (
            [source("a", 9, cap=0)],
            r"data.mixture.0.max_epochs: allows less than one of the 9 windows",
        ),
        (
            [MixtureSource("a", "f", 9, 1.0), MixtureSource("b", "f", 9, 1.0)],
            r"data.mixture.1.path: b contains the same data as a",
        ),
    ],
)
def test_refused(sources: list[MixtureSource], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(sources, seed=0)


def test_a_sample_of_a_huge_mixture_needs_no_table() -> None:
    mixture = Mixture([source("a", 5 * 10**8, 0.9), source("b", 10**8, 0.1)], seed=0)
    i, window = locate(mixture, 10**10 + 7)
    assert 0 <= window < mixture.sources[i].num_instances


# -- weights that change ---------------------------------------------------------------------------

BLOCK = 40

changing = st.lists(
    st.tuples(
        st.integers(1, 150),  # windows
        st.sampled_from([0.0, 0.2, 0.7, 1.0, 3.0]),
        st.dictionaries(
            st.integers(1, 12 * BLOCK), st.sampled_from([0.0, 0.3, 1.0, 4.0]), max_size=3
        ),
        st.one_of(st.none(), st.integers(1, 300)),
    ),
    min_size=1,
    max_size=4,
)


def changing_sources(
    rows: list[tuple[int, float, dict[int, float], int | None]],
) -> list[MixtureSource]:
    return [
        MixtureSource(f"s{i}", f"d{i}", n, weight, cap, tuple(sorted(changes.items())))
        for i, (n, weight, changes, cap) in enumerate(rows)
    ]


def weight_by_hand(source: MixtureSource, block: int) -> float:
    """Of the changes at or before the block's first sample the last counts."""
    weight = source.weight
    for samples, changed in source.changes:
        if samples <= block * BLOCK:
            weight = changed
    return weight


@settings(max_examples=300, deadline=None)
@given(changing)
def test_no_window_is_skipped_or_read_twice_across_changes_and_caps(
    rows: list[tuple[int, float, dict[int, float], int | None]],
) -> None:
    """Block by block: what each source gives goes on where it stopped, in shares of the weights of
    that block.
    """
    sources = changing_sources(rows)
    mixture = Mixture(sources, seed=2, block=BLOCK)
    total = 15 * BLOCK if mixture.num_samples is None else min(15 * BLOCK, mixture.num_samples)
    corpora, positions = mixture.stream_positions(np.arange(total))
    consumed = [0] * len(sources)
    for first in range(0, total, BLOCK):
        own = corpora[first : first + BLOCK]
        weights = [weight_by_hand(source, first // BLOCK) for source in sources]
        left = [
            np.inf if source.max_instances is None else source.max_instances - c
            for source, c in zip(sources, consumed, strict=True)
        ]
        active = [w if rest else 0.0 for w, rest in zip(weights, left, strict=True)]
        scarce = any(
            w and w / sum(active) * BLOCK + 1 > rest for w, rest in zip(active, left, strict=True)
        )
        for i, weight in enumerate(active):
            read = sorted(positions[first : first + BLOCK][own == i].tolist())
            # none skipped, none twice
            assert read == list(range(consumed[i], consumed[i] + len(read)))
            assert len(read) <= left[i] and (weight or not read)
            assert scarce or abs(len(read) - weight / sum(active) * BLOCK) < 1
            consumed[i] += len(read)
    # it ends only where nothing with a weight is left
    if mixture.num_samples is not None and mixture.num_samples == total:
        end = -(-total // BLOCK)
        blocks = range(end - 1, end) if total % BLOCK else range(end, end + 1)
        for i, source in enumerate(sources):
            assert all(
                not weight_by_hand(source, block) or consumed[i] == source.max_instances
                for block in blocks
            )
    _, windows = mixture.lookup(np.arange(total))
    for i, source in enumerate(sources):
        ordered = windows[corpora == i][np.argsort(positions[corpora == i])].tolist()
        for k in range(0, len(ordered), source.num_instances):
            epoch = ordered[k : k + source.num_instances]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(source.num_instances))


@settings(max_examples=100, deadline=None)
@given(changing, st.integers(0, 3), st.integers(1, 12 * BLOCK), st.sampled_from([0.5, 2.0]))
def test_a_later_change_leaves_everything_before_it_alone(
    rows: list[tuple[int, float, dict[int, float], int | None]],
    which: int,
    samples: int,
    weight: float,
) -> None:
    sources = changing_sources(rows)
    i = which % len(sources)
    before = [
        replace(s, changes=tuple((n, w) for n, w in s.changes if n < samples)) for s in sources
    ]
    after = [
        replace(s, changes=(*s.changes, (samples, weight))) if k == i else s
        for k, s in enumerate(before)
    ]
    plain, changed = Mixture(before, seed=2, block=BLOCK), Mixture(after, seed=2, block=BLOCK)
    until = -(-samples // BLOCK) * BLOCK
    until = min(
        until, *(m.num_samples for m in (plain, changed) if m.num_samples is not None), until
    )
    for ours, theirs in zip(
        plain.lookup(np.arange(until)), changed.lookup(np.arange(until)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_annealing_by_hand() -> None:
    """Web text and books; at 25,000 samples the web goes down to a tenth and a third corpus comes
    in, at 45,000 books leave.
    """
    mixture = Mixture(
        [
            MixtureSource("web", "w", 10**6, 8.0, None, ((25_000, 1.0),)),
            MixtureSource("books", "b", 10**6, 2.0, None, ((45_000, 0.0),)),
            MixtureSource("math", "m", 10**6, 0.0, None, ((25_000, 7.0),)),
        ],
        seed=0,
    )
    assert [
        (stage.first_block, stage.quotas.tolist(), stage.consumed.tolist())
        for stage in mixture.stages
    ] == [
        (0, [8000, 2000, 0], [0, 0, 0]),
        (3, [1000, 2000, 7000], [24_000, 6000, 0]),
        (5, [1250, 0, 8750], [26_000, 10_000, 14_000]),
    ]
    assert mixture.changes == [3, 5] and mixture.num_samples is None


@pytest.mark.parametrize(("samples", "block"), [(1, 1), (40, 1), (41, 2), (80, 2)])
def test_a_change_takes_effect_with_the_first_block_at_or_after_it(
    samples: int, block: int
) -> None:
    mixture = Mixture(
        [
            MixtureSource("a", "a", 99, 1.0),
            MixtureSource("b", "b", 99, 0.0, None, ((samples, 1.0),)),
        ],
        seed=0,
        block=BLOCK,
    )
    corpora, _ = mixture.stream_positions(np.arange(4 * BLOCK))
    assert int(np.flatnonzero(corpora == 1)[0]) // BLOCK == block == mixture.changes[0]


def test_a_mixture_ends_where_no_weight_is_left_even_if_a_corpus_would_come_later() -> None:
    later = MixtureSource("b", "b", 99, 0.0, None, ((3 * BLOCK, 1.0),))
    assert Mixture([source("a", 50, cap=50), later], seed=0, block=BLOCK).num_samples == 50
    assert Mixture([source("a", 80, cap=80), later], seed=0, block=BLOCK).num_samples == 80
    assert Mixture([source("a", 120, cap=120), later], seed=0, block=BLOCK).num_samples is None


def test_a_change_to_a_weight_too_small_for_a_block_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"data.mixture.1.weight_at: 1e-06 gives b no sample in a block of 10000"
    ):
        Mixture([source("a", 9), MixtureSource("b", "b", 9, 1.0, None, ((5, 1e-6),))], seed=0)


def test_in_means_over_corpora_the_first_weight_that_is_not_zero_counts() -> None:
    assert MixtureSource("a", "a", 9, 0.5, None, ((5, 0.0),)).first_weight == 0.5
    assert (
        MixtureSource("a", "a", 9, 0.0, None, ((5, 0.0), (9, 2.0), (12, 3.0))).first_weight == 2.0
    )


CONFIG: dict[str, Any] = {
    "run": {"dir": "unused"},
    "train": {"steps": 1},
    "batch": {"global": 4, "micro": 4},
    "model": {
        "num_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "vocab_size": 384,
    },
    "schedule": {"stages": [{"shape": "constant", "start": 1e-3}]},
}


def entry(weight: float, *changes: tuple[float, float]) -> dict[str, Any]:
    return {
        "path": "x",
        "weight": weight,
        "weight_at": [{"tokens": tokens, "weight": w} for tokens, w in changes],
    }


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([entry(1, (5, float("nan")))], "data.mixture.0.weight_at.0.weight: nan is not allowed"),
        ([entry(1, (5, -1.0))], "data.mixture.0.weight_at.0.weight: -1.0 is not allowed"),
        ([entry(-1)], "data.mixture.0.weight: -1 is not allowed"),
        ([entry(1, (0, 1.0))], "data.mixture.0.weight_at.0.tokens: 0 is not allowed"),
        ([entry(1, (2.5, 1.0))], "data.mixture.0.weight_at.0.tokens: 2.5 is not allowed"),
        ([entry(1), entry(1, (9, 1.0), (5, 2.0))], "data.mixture.1.weight_at: tokens 5 after 9"),
        ([entry(1, (9, 1.0), (9, 2.0))], "data.mixture.0.weight_at: tokens 9 after 9"),
        ([entry(1), entry(0)], "data.mixture.1.weight: 0.0 at every point of the run"),
        ([entry(0, (5, 1.0))], "data.mixture: the weights of all corpora are 0 at the start"),
        (
            [entry(1, (9, 0.0)), entry(0, (7, 1.0), (20, 0.0))],
            "data.mixture: the weights of all corpora are 0 from 20 tokens on",
        ),
        (
            [{"path": "x", "weight_at": [{"token": 1, "weight": 2}]}],
            "did you mean 'data.mixture.0.weight_at.0.tokens'?",
        ),
    ],
)
def test_settings_that_are_refused(mixture: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_config({**CONFIG, "data": {"sequence_length": 8, "mixture": mixture}})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_fine_tuning_refuses_changes_at_token_counts() -> None:
    with pytest.raises(
        UserError, match=r"^data.mixture.1.weight_at: changes at token counts are for pretraining"
    ):
        build_config(
            {
                **CONFIG,
                "task": "sft",
                "data": {"sequence_length": 8, "mixture": [entry(1), entry(1, (5, 2.0))]},
            }
        )

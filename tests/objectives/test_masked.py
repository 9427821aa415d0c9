"""The masked objective against exact enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from llada.objectives import (
    TOKENS,
    Corrupted,
    Key,
    Layout,
    MaskedDiffusion,
    NoiseGroups,
    Row,
    Terms,
    collate,
)
from llada.objectives import row as module
from tests.objectives.toy import (
    MASK,
    L,
    exact_nelbo,
    losses_of_a_toy_model,
    masked,
    whole_segments,
)


def weighted_loss(
    objective: MaskedDiffusion,
    model: dict[frozenset[int], np.ndarray],
    t: float,
    draws: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[float, int]:
    monkeypatch.setattr(module, "mask_uniforms", lambda *_: draws)
    inputs, positions, weights = masked(objective, 0, np.arange(L), [0, L], [t])
    assert (inputs[positions] == MASK).all()
    assert (np.delete(inputs, positions) == np.delete(np.arange(L), positions)).all()
    losses = model[frozenset(positions.tolist())][positions]
    return float((weights * losses).sum()), len(positions)


def test_fixed_count_is_the_exact_nelbo(monkeypatch: pytest.MonkeyPatch) -> None:
    model = losses_of_a_toy_model()
    objective = MaskedDiffusion(MASK, "fixed_count")
    total, seen = 0.0, []
    for cell in range(L):  # t uniform: each cell of width 1/L gives one count
        # draws: each order of the positions is equally likely
        for ranks in itertools.permutations(range(L)):
            loss, count = weighted_loss(
                objective, model, (cell + 0.37) / L, np.array(ranks) / L, monkeypatch
            )
            total += loss
            seen.append(count)
    assert sorted(set(seen)) == [1, 2, 3, 4]
    assert total / (L * math.factorial(L)) == pytest.approx(exact_nelbo(model), abs=1e-12)


@pytest.mark.parametrize("eps", [1e-3, 0.2])
def test_bernoulli_is_the_integral_from_eps_to_one(
    eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = losses_of_a_toy_model()

    def beta(k: int) -> float:
        """Integral of p^(k-1) (1-p)^(L-k) over [eps, 1], expanded."""
        return sum(
            math.comb(L - k, j) * (-1) ** j * (1 - eps ** (k + j)) / (k + j)
            for j in range(L - k + 1)
        )

    exact = sum(model[s][list(s)].sum() * beta(len(s)) for s in model if s) / (1 - eps)
    objective = MaskedDiffusion(MASK, "bernoulli", eps)
    # the integrand is a polynomial of degree 3 in t
    nodes, node_weights = np.polynomial.legendre.leggauss(4)
    total = 0.0
    for node, node_weight in zip((nodes + 1) / 2, node_weights / 2, strict=True):
        p = (1 - eps) * node + eps
        for chosen in itertools.product([False, True], repeat=L):
            draws = np.where(chosen, p / 2, (1 + p) / 2)
            loss, count = weighted_loss(objective, model, float(node), draws, monkeypatch)
            assert count == sum(chosen)
            total += node_weight * p**count * (1 - p) ** (L - count) * loss
    assert total == pytest.approx(exact, abs=1e-12)
    assert exact == pytest.approx(exact_nelbo(model), abs=10 * eps)  # and close to the bound itself


def test_constant_loss_has_mean_one_and_the_analytic_variance() -> None:
    """With CE = 1, fixed-count gives exactly 1, and bernoulli 1 on average.

    The variance of bernoulli over t and masks is (ln(1/eps) / (1-eps) - 1) / L.
    """
    length, eps, count = 64, 0.05, 20_000
    t = np.random.default_rng(1).random(count)
    values = {}
    for masking, rows in (("bernoulli", count), ("fixed_count", 500)):
        objective = MaskedDiffusion(MASK, masking, eps)
        tokens = np.zeros(length, dtype=np.int64)
        sums = [
            masked(objective, i, tokens, [0, length], t[i : i + 1])[2].sum() for i in range(rows)
        ]
        values[masking] = np.array(sums) / length
    np.testing.assert_allclose(values["fixed_count"], 1.0, atol=1e-12)
    variance = (math.log(1 / eps) / (1 - eps) - 1) / length
    assert values["bernoulli"].mean() == pytest.approx(1.0, abs=4 * math.sqrt(variance / count))
    assert values["bernoulli"].var() == pytest.approx(variance, rel=0.06)


def test_segments_have_their_own_t_and_masks_do_not_depend_on_the_segmentation() -> None:
    objective = MaskedDiffusion(MASK, "bernoulli")
    tokens = np.arange(200) % 9
    _, whole, whole_weights = masked(objective, 5, tokens, [0, 200], [0.6], seed=4)
    _, split, split_weights = masked(objective, 5, tokens, [0, 80, 200], [0.6, 0.6], seed=4)
    np.testing.assert_array_equal(whole, split)
    np.testing.assert_array_equal(whole_weights, split_weights)
    _, mixed, mixed_weights = masked(objective, 5, tokens, [0, 80, 200], [0.1, 0.6], seed=4)
    np.testing.assert_array_equal(mixed[mixed >= 80], whole[whole >= 80])
    assert set(mixed_weights) == {1 / (0.999 * 0.1 + 0.001), 1 / (0.999 * 0.6 + 0.001)}


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_count"])
def test_a_sample_gets_the_noise_in_the_middle_of_a_row_that_it_gets_alone(masking: str) -> None:
    """Samples 5 and 8, of 20 and 12 tokens, in one row, the second with a prompt of 4."""
    objective = MaskedDiffusion(MASK, masking, eps=0.2)
    tokens = np.arange(20) % 9
    groups = NoiseGroups(
        ids=np.array([3, 4, 5]),
        spans=np.array([[0, 8], [8, 20], [24, 32]]),
        samples=np.array([5, 5, 8]),
        origins=np.array([0, 0, 20]),
        t=np.array([0.3, 0.6, 0.7]),
        scales=np.ones(3),
    )
    packed = Row(np.concatenate([tokens, tokens[:12]]), np.array([0, 20, 32]), groups)
    terms = objective.corrupt(packed, Key(1)).terms[TOKENS]
    first = objective.corrupt(whole_segments(5, tokens, [0, 8, 20], [0.3, 0.6]), Key(1))
    alone = NoiseGroups.of_whole_samples(np.array([8]), np.array([[4, 12]]), np.array([0.7]))
    second = objective.corrupt(Row(tokens[:12], np.array([0, 12]), alone), Key(1))
    parts = (first.terms[TOKENS], second.terms[TOKENS])
    expected = [*parts[0].positions.tolist(), *(20 + parts[1].positions).tolist()]
    assert terms.positions.tolist() == expected
    assert terms.weights.tolist() == [*parts[0].weights.tolist(), *parts[1].weights.tolist()]
    assert terms.groups.tolist() == [*(3 + parts[0].groups).tolist(), *[5] * len(parts[1].groups)]

    # Another purpose has noise of its own: validation is not what was trained on.
    other = objective.corrupt(packed, Key(1, "validation")).terms[TOKENS]
    assert other.positions.tolist() != terms.positions.tolist()


def test_fixed_count_counts_per_segment() -> None:
    objective = MaskedDiffusion(MASK, "fixed_count")
    tokens = np.zeros(100, dtype=np.int64)
    _, positions, weights = masked(objective, 5, tokens, [0, 10, 100], [0.55, 0.999], seed=4)
    assert (positions < 10).sum() == 6 and (positions >= 10).sum() == 90
    assert set(weights) == {10 / 6, 90 / 90}


def test_fixed_count_masks_the_smallest_draws_of_each_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gaps between groups, a group of one token, an empty one; of equal draws the earlier."""
    draws = np.array([0.9, 0.5, 0.1, 0.5, 0.5, 0.0, 0.7, 0.3, 0.2, 0.6])
    monkeypatch.setattr(module, "mask_uniforms", lambda *_: draws)
    spans = np.array([[1, 5], [5, 5], [6, 7], [7, 10]])
    t = np.array([0.3, 0.9, 0.5, 0.4])  # of 4, 0, 1 and 3 tokens: 2, 0, 1 and 2 masked
    groups = NoiseGroups.of_whole_samples(np.zeros(4, dtype=np.int64), spans, t)
    row = Row(np.arange(10), np.array([0, 10]), groups)
    terms = MaskedDiffusion(99, "fixed_count").corrupt(row, Key(1)).terms[TOKENS]
    assert terms.positions.tolist() == [1, 2, 6, 7, 8]
    assert terms.weights.tolist() == [2, 2, 1, 1.5, 1.5]
    assert terms.groups.tolist() == [0, 0, 2, 3, 3]


def test_special_tokens_are_masked_like_any_other() -> None:
    """Every position, EOS included, is masked with the same frequency."""
    objective = MaskedDiffusion(MASK, "bernoulli")
    hits = np.zeros(16)
    for sample in range(4000):
        hits[masked(objective, sample, np.arange(16), [0, 16], [0.5])[1]] += 1
    assert np.abs(hits / 4000 - 0.5005).max() < 4.5 * math.sqrt(0.25 / 4000)


def test_collate_orders_terms_and_names_their_groups() -> None:
    objective = MaskedDiffusion(MASK, "fixed_count")
    groups = NoiseGroups.of_whole_samples(
        np.array([0, 1, 1]), np.array([[0, 8], [0, 3], [3, 8]]), np.array([0.5, 0.2, 0.9])
    )
    rows = [
        Row(np.arange(8), np.array([0, 8]), groups[:1]),
        Row(np.arange(8)[::-1].copy(), np.array([0, 3, 8]), groups[1:]),
    ]
    corrupted = [objective.corrupt(row, Key(1)) for row in rows]
    batch = collate(corrupted, 16.0)
    terms = batch.terms[TOKENS]
    keys = (terms.columns * 2 + terms.rows).tolist()
    assert keys == sorted(keys)
    for row, column, target, weight, group in zip(
        terms.rows, terms.columns, terms.targets, terms.weights, terms.groups, strict=True
    ):
        own = corrupted[row].terms[TOKENS]
        assert batch.inputs[row, column] == MASK and target == rows[row].tokens[column]
        assert weight == pytest.approx(own.weights[list(own.positions).index(int(column))])
        assert group == (0 if row == 0 else (1 if column < 3 else 2))
    assert batch.inputs.ne(MASK).sum() + len(keys) == 16


def test_terms_at_one_position_keep_their_order() -> None:
    """Two rows; the first has three terms at position 2."""

    def row(positions: list[int], targets: list[int]) -> Corrupted:
        count = len(positions)
        terms = Terms(
            positions=np.array(positions),
            targets=np.array(targets),
            weights=np.ones(count),
            groups=np.zeros(count, dtype=np.int64),
            aux={"alpha": np.array(targets) / 10},
        )
        return Corrupted(
            np.zeros(4, dtype=np.int64), np.arange(4), Layout(((0, 4),), 4), {TOKENS: terms}
        )

    batch = collate([row([2, 2, 2, 0], [7, 5, 6, 4]), row([2, 1], [3, 2])], 1.0)
    terms = batch.terms[TOKENS]
    assert terms.columns.tolist() == [0, 1, 2, 2, 2, 2]
    assert terms.rows.tolist() == [0, 1, 0, 0, 0, 1]
    assert terms.targets.tolist() == [4, 2, 7, 5, 6, 3]
    assert (terms.aux["alpha"] * 10).round().tolist() == terms.targets.tolist()


def test_the_expected_number_of_terms_matches_the_draws() -> None:
    t = np.array([0.3, 0.8])
    tokens = np.zeros(256, dtype=np.int64)
    groups = whole_segments(0, tokens, [0, 64, 256], t).groups
    for masking in ("bernoulli", "fixed_count"):
        objective = MaskedDiffusion(MASK, masking)
        drawn = [len(masked(objective, s, tokens, [0, 64, 256], t)[1]) for s in range(500)]
        work = objective.work(groups.sizes, groups)
        assert work.terms[TOKENS] == pytest.approx(np.mean(drawn), rel=0.01)
        assert work.attended_pairs == 64**2 + 192**2


@pytest.mark.parametrize(
    "draws", [[0.5, 0.25, 0.25, 0.25, 0.75], [0.25] * 5, [0.1, 0.9, 0.1, 0.2, 0.2]]
)
def test_of_equal_draws_the_earlier_positions_are_masked(
    draws: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "mask_uniforms", lambda *_: np.array(draws))
    objective = MaskedDiffusion(MASK, "fixed_count")
    for count in range(1, 6):
        _, positions, _ = masked(objective, 0, np.arange(5), [0, 5], [(count - 0.5) / 5])
        assert positions.tolist() == sorted(sorted(range(5), key=lambda i: draws[i])[:count])


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_count"])
def test_positions_outside_the_groups_and_groups_of_scale_zero_are_left_alone(
    masking: str,
) -> None:
    """A prompt before the first group, filler behind the last, and a group that counts nothing."""
    objective = MaskedDiffusion(MASK, masking, eps=0.2)
    spans = np.array([[3, 20], [25, 40]])
    for sample in range(50):
        groups = NoiseGroups.of_whole_samples(
            np.full(2, sample), spans, np.array([0.9, 0.9]), np.array([0.25, 0.0])
        )
        row = Row(np.arange(64), np.array([0, 20, 40, 64]), groups)
        terms = objective.corrupt(row, Key(0)).terms[TOKENS]
        assert len(terms.positions)
        assert terms.positions.min() >= 3 and terms.positions.max() < 20
        weight = 1 / (0.8 * 0.9 + 0.2) if masking == "bernoulli" else 17 / 16
        assert set(terms.weights) == {0.25 * weight}

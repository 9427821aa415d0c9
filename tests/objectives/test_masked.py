"""The masked objective against exact enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from llada.objectives import MaskedDiffusion, Window, collate
from llada.objectives import masked as module

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


def weighted_loss(
    objective: MaskedDiffusion,
    model: dict[frozenset[int], np.ndarray],
    t: float,
    draws: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[float, int]:
    monkeypatch.setattr(module, "mask_uniforms", lambda *_: draws)
    window = Window(0, np.arange(L), np.array([0, L]), np.array([t]), 0)
    c = objective.corrupt(window)
    assert (c.inputs[c.predicted] == MASK).all() and (
        np.delete(c.inputs, c.predicted) == np.delete(np.arange(L), c.predicted)
    ).all()
    return float((c.weights * model[frozenset(c.predicted.tolist())][c.predicted]).sum()), len(
        c.predicted
    )


def test_fixed_count_is_the_exact_nelbo(monkeypatch: pytest.MonkeyPatch) -> None:
    model = losses_of_a_toy_model()
    objective = MaskedDiffusion(0, MASK, "fixed_count")
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
    objective = MaskedDiffusion(0, MASK, "bernoulli", eps)
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
        objective = MaskedDiffusion(0, MASK, masking, eps)
        windows = (
            Window(i, np.zeros(length, dtype=np.int64), np.array([0, length]), t[i : i + 1], 0)
            for i in range(rows)
        )
        values[masking] = np.array([objective.corrupt(w).weights.sum() / length for w in windows])
    np.testing.assert_allclose(values["fixed_count"], 1.0, atol=1e-12)
    variance = (math.log(1 / eps) / (1 - eps) - 1) / length
    assert values["bernoulli"].mean() == pytest.approx(1.0, abs=4 * math.sqrt(variance / count))
    assert values["bernoulli"].var() == pytest.approx(variance, rel=0.06)


def test_segments_have_their_own_t_and_masks_do_not_depend_on_the_segmentation() -> None:
    objective = MaskedDiffusion(4, MASK, "bernoulli")
    tokens = np.arange(200) % 9
    whole = objective.corrupt(Window(5, tokens, np.array([0, 200]), np.array([0.6]), 0))
    split = objective.corrupt(Window(5, tokens, np.array([0, 80, 200]), np.array([0.6, 0.6]), 0))
    np.testing.assert_array_equal(whole.predicted, split.predicted)
    np.testing.assert_array_equal(whole.weights, split.weights)
    mixed = objective.corrupt(Window(5, tokens, np.array([0, 80, 200]), np.array([0.1, 0.6]), 0))
    np.testing.assert_array_equal(
        mixed.predicted[mixed.predicted >= 80], whole.predicted[whole.predicted >= 80]
    )
    assert set(mixed.weights) == {1 / (0.999 * 0.1 + 0.001), 1 / (0.999 * 0.6 + 0.001)}


def test_fixed_count_counts_per_segment() -> None:
    objective = MaskedDiffusion(4, MASK, "fixed_count")
    c = objective.corrupt(
        Window(5, np.zeros(100, dtype=np.int64), np.array([0, 10, 100]), np.array([0.55, 0.999]), 0)
    )
    assert (c.predicted < 10).sum() == 6 and (c.predicted >= 10).sum() == 90
    assert set(c.weights) == {10 / 6, 90 / 90}


def test_special_tokens_are_masked_like_any_other() -> None:
    """Every position, EOS included, is masked with the same frequency."""
    objective = MaskedDiffusion(0, MASK, "bernoulli")
    hits = np.zeros(16)
    for sample in range(4000):
        hits[
            objective.corrupt(
                Window(sample, np.arange(16), np.array([0, 16]), np.array([0.5]), 0)
            ).predicted
        ] += 1
    assert np.abs(hits / 4000 - 0.5005).max() < 4.5 * math.sqrt(0.25 / 4000)


def test_collate_orders_predictions_and_names_their_segments() -> None:
    objective = MaskedDiffusion(1, MASK, "fixed_count")
    windows = [
        Window(0, np.arange(8), np.array([0, 8]), np.array([0.5]), 0),
        Window(1, np.arange(8)[::-1].copy(), np.array([0, 3, 8]), np.array([0.2, 0.9]), 1),
    ]
    corrupted = [objective.corrupt(w) for w in windows]
    batch = collate(windows, corrupted, 16.0)
    keys = (batch.columns * 2 + batch.rows).tolist()
    assert keys == sorted(keys)
    for row, column, target, weight, segment in zip(
        batch.rows, batch.columns, batch.targets, batch.weights, batch.segments, strict=True
    ):
        window, c = windows[row], corrupted[row]
        assert batch.inputs[row, column] == MASK and target == window.tokens[column]
        assert weight == pytest.approx(c.weights[list(c.predicted).index(int(column))])
        assert segment == (0 if row == 0 else (1 if column < 3 else 2))
    assert batch.inputs.ne(MASK).sum() + len(keys) == 16


def test_expected_predictions_match_the_draws() -> None:
    lengths, t = np.array([64, 192]), np.array([0.3, 0.8])
    for masking in ("bernoulli", "fixed_count"):
        objective = MaskedDiffusion(0, MASK, masking)
        drawn = [
            len(
                objective.corrupt(
                    Window(s, np.zeros(256, dtype=np.int64), np.array([0, 64, 256]), t, 0)
                ).predicted
            )
            for s in range(500)
        ]
        assert objective.expected_predictions(lengths, t) == pytest.approx(np.mean(drawn), rel=0.01)


@pytest.mark.parametrize(
    "draws", [[0.5, 0.25, 0.25, 0.25, 0.75], [0.25] * 5, [0.1, 0.9, 0.1, 0.2, 0.2]]
)
def test_of_equal_draws_the_earlier_positions_are_masked(
    draws: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "mask_uniforms", lambda *_: np.array(draws))
    objective = MaskedDiffusion(0, MASK, "fixed_count")
    for count in range(1, 6):
        c = objective.corrupt(
            Window(0, np.arange(5), np.array([0, 5]), np.array([(count - 0.5) / 5]), 0)
        )
        assert c.predicted.tolist() == sorted(sorted(range(5), key=lambda i: draws[i])[:count])


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_count"])
def test_positions_outside_the_spans_and_segments_of_scale_zero_are_left_alone(
    masking: str,
) -> None:
    """A prompt before the span, filler behind it, and a segment that counts nothing."""
    objective = MaskedDiffusion(0, MASK, masking, eps=0.2)
    spans, scales = np.array([[3, 20], [25, 40], [64, 64]]), np.array([0.25, 0.0, 0.0])
    for sample in range(50):
        t = np.array([0.9, 0.9, 0.0])
        c = objective.corrupt(
            Window(sample, np.arange(64), np.array([0, 20, 40, 64]), t, 0, spans, scales)
        )
        assert len(c.predicted) and c.predicted.min() >= 3 and c.predicted.max() < 20
        weight = 1 / (0.8 * 0.9 + 0.2) if masking == "bernoulli" else 17 / 16
        assert set(c.weights) == {0.25 * weight}

"""Schedules and discrete steps, by enumeration of everything that can be masked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llada.objectives import TOKENS, MaskedDiffusion, NoiseGroups, schedules
from llada.objectives import row as module
from llada.objectives.discrete_steps import StepSchedule, discrete_steps
from llada.objectives.schedules import Schedule
from tests.objectives.toy import MASK, L, exact_nelbo, losses_of_a_toy_model, masked

SCHEDULES: dict[str, Schedule] = {
    "llada": schedules.llada,
    "cosine": schedules.cosine,
    "loglinear": schedules.LogLinear(1e-6),
    "linear": schedules.Linear(1e-6, 20.0),
    "geometric": schedules.Geometric(1e-6, 20.0),
}
"""All of them mask nothing at t = 0 and everything at t = 1, but for about 1e-6."""


def expected_loss(
    objective: MaskedDiffusion,
    model: dict[frozenset[int], np.ndarray],
    t: float,
    monkeypatch: pytest.MonkeyPatch,
) -> float:
    """The mean of the weighted loss at t over all sets of masked positions."""
    probability = float(objective._rates(np.array([t])).probability[0])
    total = 0.0
    for chosen in itertools.product([False, True], repeat=L):
        # A draw below the probability masks.
        draws = np.where(chosen, probability * 0.5, 1.0)
        monkeypatch.setattr(module, "mask_uniforms", lambda *_, draws=draws: draws)
        _, positions, weights = masked(objective, 0, np.arange(L), [0, L], [t])
        assert positions.tolist() == np.flatnonzero(chosen).tolist()
        losses = model[frozenset(positions.tolist())][positions]
        chance = probability ** sum(chosen) * (1 - probability) ** (L - sum(chosen))
        total += chance * float((weights * losses).sum())
    return total


def integral(
    objective: MaskedDiffusion,
    model: dict[frozenset[int], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> float:
    """The expected loss of a draw, t uniform: Gauss-Legendre on 24 parts of equal length."""
    nodes, node_weights = np.polynomial.legendre.leggauss(6)
    parts = 24
    total = 0.0
    for part in range(parts):
        for node, weight in zip(nodes, node_weights, strict=True):
            t = (part + (node + 1) / 2) / parts
            total += weight / 2 / parts * expected_loss(objective, model, t, monkeypatch)
    return total


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_from_clean_to_masked_has_the_bound_as_its_mean(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = losses_of_a_toy_model()
    objective = MaskedDiffusion(MASK, eps=1e-9, schedule=SCHEDULES[name])
    mean = integral(objective, model, monkeypatch)
    assert mean == pytest.approx(exact_nelbo(model), rel=1e-4)


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), schedules.Clipped(0.3, 0.8)])
def test_the_weight_is_the_derivative_over_the_probability(schedule: Schedule) -> None:
    t = np.linspace(0.05, 0.95, 19)
    step = 1e-6
    derivative = (schedule(t + step).probability - schedule(t - step).probability) / (2 * step)
    rates = schedule(t)
    np.testing.assert_allclose(rates.weight, derivative / rates.probability, rtol=1e-6, atol=1e-9)
    assert (np.diff(rates.probability) > 0).all()


def test_clipped_is_the_part_of_the_bound_between_its_rates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three neighboring ranges add up to the whole."""
    model = losses_of_a_toy_model()
    edges = [1e-9, 0.3, 0.8, 1.0]
    parts = [
        integral(
            MaskedDiffusion(MASK, eps=1e-9, schedule=schedules.Clipped(low, high)),
            model,
            monkeypatch,
        )
        for low, high in itertools.pairwise(edges)
    ]
    assert sum(parts) == pytest.approx(exact_nelbo(model), rel=1e-6)


def test_rates_by_hand() -> None:
    """The example of the module, and two values of each of the others."""
    half = np.array([0.5])
    rates = schedules.cosine(half)
    assert rates.probability[0] == pytest.approx(np.sqrt(0.5))
    assert rates.weight[0] == pytest.approx(np.pi / 2)
    assert schedules.LogLinear(0.01)(half).probability[0] == pytest.approx(0.495)
    assert schedules.LogLinear(0.01)(half).weight[0] == pytest.approx(2.0)
    # -log alpha is 1 in the middle of both.
    for schedule in (schedules.Linear(0.5, 1.5), schedules.Geometric(0.1, 10.0)):
        assert schedule(half).probability[0] == pytest.approx(1 - np.exp(-1))


def elbo_of_steps(steps: int, model: dict[frozenset[int], np.ndarray]) -> float:
    """The sum over the steps of D3PM: each reveals a masked token with probability 1 / i."""
    total = 0.0
    for i in range(1, steps + 1):
        probability = i / steps
        for chosen in itertools.product([False, True], repeat=L):
            chance = probability ** sum(chosen) * (1 - probability) ** (L - sum(chosen))
            positions = np.flatnonzero(chosen)
            losses = model[frozenset(positions.tolist())][positions]
            total += chance * float(losses.sum()) / i
    return total


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_discrete_steps_have_the_bound_of_d3pm(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = losses_of_a_toy_model()
    objective = discrete_steps(MASK, steps)
    # Each step is 1 / T of the range of t.
    mean = np.mean(
        [expected_loss(objective, model, (i + 0.4) / steps, monkeypatch) for i in range(steps)]
    )
    assert mean == pytest.approx(elbo_of_steps(steps, model), rel=1e-12)
    assert objective.bound() is objective


def test_many_steps_approach_continuous_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = losses_of_a_toy_model()
    assert elbo_of_steps(20_000, model) == pytest.approx(exact_nelbo(model), rel=1e-4)
    rates = StepSchedule(10**7)(np.array([0.3, 0.7]))
    np.testing.assert_allclose(rates.probability, [0.3, 0.7], atol=2e-7)
    np.testing.assert_allclose(rates.weight, 1 / rates.probability)


def test_the_bound_of_every_schedule_is_fixed_count() -> None:
    objective = MaskedDiffusion(MASK, schedule=schedules.cosine, schedule_name="cosine", subs=True)
    bound = objective.bound()
    assert bound.masking == "fixed_count" and bound.subs
    assert objective.losses == bound.losses


@pytest.mark.parametrize("name", ["cosine", "geometric"])
def test_the_expected_number_of_terms_matches_the_draws(name: str) -> None:
    objective = MaskedDiffusion(MASK, schedule=SCHEDULES[name])
    t = np.full(1, 0.6)
    counts = [
        len(masked(objective, sample, np.zeros(64, dtype=np.int64), [0, 64], t)[1])
        for sample in range(400)
    ]
    spans = np.array([[0, 64]])
    groups = NoiseGroups.of_whole_samples(np.zeros(1, dtype=np.int64), spans, t)
    expected = objective.work(np.array([64]), groups).terms[TOKENS]
    assert np.mean(counts) == pytest.approx(expected, abs=4 * np.sqrt(64 / 4 / 400))

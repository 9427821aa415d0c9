"""From the settings of a config to an objective: every setting reaches what it is about."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from llada.config import build_config
from llada.objectives.autoregressive import Autoregressive
from llada.objectives.masked import MaskedDiffusion
from llada.objectives.registry import SpecialIds, make_objective, start_id
from tests.workplace import CONFIG

IDS = SpecialIds(mask=7, start=3)


def objective(**settings: object) -> object:
    return make_objective(build_config({**CONFIG, "objective": settings}).objective, IDS)


@pytest.mark.parametrize(
    ("settings", "probability", "weight"),
    [
        # At t = 5 / 9, with eps = 0.1 the time is 0.9 x 5 / 9 + 0.1 = 0.6.
        ({}, 0.6, 1 / 0.6),
        (
            {"schedule": "cosine"},
            math.sin(0.3 * math.pi),
            math.pi / 2 / math.tan(0.3 * math.pi),
        ),
        ({"schedule": "loglinear"}, 0.9 * 0.6, 1 / 0.6),
        # -log alpha = 0.1 + 5 x 0.6 = 3.1, and its derivative is 5.
        (
            {"schedule": "linear", "sigma_min": 0.1, "sigma_max": 5.1},
            1 - math.exp(-3.1),
            5 * math.exp(-3.1) / (1 - math.exp(-3.1)),
        ),
        # -log alpha = 0.1 x 64^0.6, and its derivative is log 64 times that.
        (
            {"schedule": "geometric", "sigma_min": 0.1, "sigma_max": 6.4},
            1 - math.exp(-(0.1 * 64**0.6)),
            math.log(64) * 0.1 * 64**0.6 / (math.exp(0.1 * 64**0.6) - 1),
        ),
        ({"schedule": "clipped", "clip": [0.2, 0.7]}, 0.2 + 0.5 * 0.6, 0.5 / 0.5),
    ],
)
def test_schedules_have_the_settings_of_the_config(
    settings: dict[str, object], probability: float, weight: float
) -> None:
    made = objective(eps=0.1, **settings)
    assert isinstance(made, MaskedDiffusion) and made.mask_id == 7
    rates = made._rates(np.array([5 / 9]))
    assert rates.probability[0] == pytest.approx(probability, rel=1e-12)
    assert rates.weight[0] == pytest.approx(weight, rel=1e-12)


def test_other_settings_reach_their_objective() -> None:
    made = objective(masking="fixed_count", timesteps="iid", subs=True)
    assert isinstance(made, MaskedDiffusion)
    assert (made.masking, made.timesteps, made.subs) == ("fixed_count", "iid", True)
    steps = objective(name="discrete_steps", steps=5, timesteps="iid")
    assert isinstance(steps, MaskedDiffusion) and steps.timesteps == "iid"
    # t = 0.5 is in the third of five steps.
    assert steps._rates(np.array([0.5])).probability[0] == pytest.approx(3 / 5)
    assert objective(name="autoregressive") == Autoregressive(3)


@pytest.mark.parametrize(("bos", "start"), [(5, 5), (0, 0), (None, 2)])
def test_a_text_begins_with_bos_or_else_eos(bos: int | None, start: int) -> None:
    assert start_id(SimpleNamespace(bos_id=bos, eos_id=2)) == start


@pytest.mark.parametrize("steps", [1, 3, 1_000_000])
def test_the_weights_of_steps_keep_their_digits(steps: int) -> None:
    """A masked token counts once in the mean: weight x probability is 1."""
    made = objective(name="discrete_steps", steps=steps)
    rates = made._rates(np.linspace(0, 0.999, 50))
    np.testing.assert_allclose(rates.weight * rates.probability, 1, rtol=1e-15)
    # The first step is drawn too.
    assert rates.probability[0] == 1 / steps

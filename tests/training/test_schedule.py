"""The learning rate against LLaDA's published schedule and plain formulas."""

from __future__ import annotations

import math

import pytest

from llada.config.sections import ScheduleSection
from llada.errors import UserError
from llada.training.schedule import Schedule


def schedule(*stages: dict[str, object], tokens_per_step: int = 1000) -> Schedule:
    return Schedule(ScheduleSection.model_validate({"stages": list(stages)}), tokens_per_step)


def test_the_published_schedule() -> None:
    """Linear 0 -> 4e-4 over 2000 iterations, constant until 1.2T tokens, 1e-4 for 0.8T, linear to
    1e-5 over the last 0.3T.
    """
    tokens = 1280 * 4096
    s = schedule(
        {"shape": "linear", "end": 4e-4, "steps": 2000},
        {"shape": "constant", "tokens": 1_200_000_000_000 - 2000 * tokens},
        {"shape": "constant", "start": 1e-4, "tokens": 800_000_000_000},
        {"shape": "linear", "start": 1e-4, "end": 1e-5, "tokens": 300_000_000_000},
        tokens_per_step=tokens,
    )
    first_drop = math.ceil((1_200_000_000_000 - 2000 * tokens) / tokens) + 2000
    second = first_drop + math.ceil(800_000_000_000 / tokens)
    last = second + math.ceil(300_000_000_000 / tokens)
    assert s.learning_rate(0) == pytest.approx(4e-4 / 2000)
    assert s.learning_rate(999) == pytest.approx(2e-4)
    assert s.learning_rate(1999) == pytest.approx(4e-4)
    assert s.learning_rate(first_drop - 1) == 4e-4 and s.learning_rate(first_drop) == 1e-4
    assert s.learning_rate(second - 1) == 1e-4 and s.learning_rate(second) < 1e-4
    assert s.learning_rate(last - 1) == pytest.approx(1e-5)
    assert s.steps == last
    with pytest.raises(UserError, match=f"schedule.stages: end after {last} steps"):
        s.learning_rate(last)


def test_cosine_and_an_open_end() -> None:
    s = schedule({"shape": "cosine", "start": 1.0, "end": 0.0, "steps": 10}, {"shape": "constant"})
    for k in range(10):
        assert s.learning_rate(k) == pytest.approx((1 + math.cos(math.pi * (k + 1) / 10)) / 2)
    assert s.steps is None and s.learning_rate(10**9) == 0.0


def test_a_longer_schedule_changes_nothing_before() -> None:
    stages = [{"shape": "linear", "end": 3e-3, "steps": 7}, {"shape": "constant", "steps": 20}]
    short, long = schedule(*stages), schedule(*stages, {"shape": "cosine", "end": 0.0, "steps": 50})
    assert [short.learning_rate(k) for k in range(27)] == [long.learning_rate(k) for k in range(27)]

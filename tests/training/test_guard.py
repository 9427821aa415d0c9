"""Steps that are not finite or far above the recent ones: named, left out, counted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada.config.sections import TrainSection
from llada.engine.base import Limits, StepResult
from llada.errors import RunError
from llada.training.guard import Applied, Guard, upper_limit
from tests.workplace import Workplace


def result(loss: float, norm: float = 1.0, applied: bool = True) -> StepResult:
    return StepResult(torch.tensor([loss, norm**2, float(not applied)], dtype=torch.float64))


def section(**changes: object) -> TrainSection:
    rule = {
        "spike_window": 20,
        "spike_sigma": 3.0,
        "spike_loss_factor": 1.0,
        "spike_norm_factor": 1.0,
    }
    return TrainSection.model_validate({"steps": 100, **rule} | changes)


def named(losses: npt.ArrayLike, norms: npt.ArrayLike, **changes: object) -> list[int]:
    """Steps (0-based) that the default rule names as spikes."""
    guard, steps = Guard(TrainSection.model_validate({"steps": 1, **changes})), []
    for step, (loss, norm) in enumerate(
        zip(np.asarray(losses).tolist(), np.asarray(norms).tolist(), strict=True)
    ):
        if guard.check(step, result(loss, norm), range(1)) is not None:
            steps.append(step)
    return steps


RECORDED = np.loadtxt(Path(__file__).parent / "recorded" / "demo.txt")
"""Loss and gradient norm of healthy steps."""


def test_too_many_steps_left_out_in_a_row_end_the_run_and_name_the_samples() -> None:
    guard, bad, good = Guard(section(max_skipped=2)), result(math.nan, applied=False), result(1.0)
    for step, each in enumerate([bad, bad, good, bad, bad]):
        guard.check(step, each, range(8 * step, 8 * step + 8))
    with pytest.raises(
        RunError,
        match=r"step 6: loss nan .* samples 40 to 47 .* 3 steps in a row .*train.max_skipped: 2",
    ):
        guard.check(5, bad, range(40, 48))


@given(st.lists(st.floats(0.1, 10), min_size=30, max_size=30), st.integers(0, 29))
def test_limits_depend_on_the_steps_up_to_two_before_whenever_they_were_read(
    losses: list[float], early: int
) -> None:
    """A GPU reports a step while it computes the next, except before a checkpoint: both must leave
    out the same steps.
    """
    guard = Guard(section(skip_spikes=True))
    for step, loss in enumerate(losses[: early + 1]):
        guard.check(step, result(loss, 2 * loss), range(1))
    window = losses[: max(0, early)][-20:]
    limits = guard.limits(early + 1)
    if len(window) < 20:
        assert limits == Limits()
    else:
        bound = upper_limit(window, 3.0, 1.0)
        assert limits == (pytest.approx(bound), pytest.approx(2 * bound))


def test_a_healthy_run_has_no_spikes_and_planted_ones_are_named() -> None:
    """Mean and six standard deviations named three of these steps, and six of the whole run."""
    loss, norm = RECORDED.T.copy()
    assert named(loss, norm) == []
    planted = np.arange(600, 1500, 150)
    norm[planted] *= 5
    loss[planted[::2] + 75] *= 1.4
    assert named(loss, norm) == sorted([*planted.tolist(), *(planted[::2] + 75).tolist()])


def test_no_false_alarm_while_the_level_moves() -> None:
    """Steps with the recorded noise around a moving level: a warm-up in which the norm rises
    tenfold, then a slow fall and swings.
    """
    steps, noise = np.arange(3_000), np.random.default_rng(0)
    loss, norm = np.log(RECORDED[300:]).T
    rows = noise.integers(len(loss) - 100, size=len(steps)) + 50

    def around(series: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.array([series[row] - np.median(series[row - 50 : row + 50]) for row in rows])

    level = np.minimum(steps / 800, 1) * math.log(10) - steps / 8000 + 0.2 * np.sin(steps / 300)
    assert named(np.exp(around(loss) + 1 - 0.3 * level), np.exp(around(norm) + level)) == []


@pytest.mark.parametrize(("sigma", "factor"), [(6.0, 1.0), (2.0, 1.5)])
def test_the_limit_is_so_many_standard_deviations_of_the_logarithm_or_a_factor(
    sigma: float, factor: float
) -> None:
    """A tenth more, because the wider of two estimates counts; and no window of normal noise is so
    narrow by chance that the limit is within the noise.
    """
    noise = np.random.default_rng(1).normal(size=(4000, 200)) * 0.1
    limits = np.array([upper_limit(np.exp(row + 3).tolist(), sigma, factor) for row in noise])
    expected = max(0.1 * sigma, math.log(factor))
    assert expected - 0.01 <= np.log(np.median(limits)) - 3 <= 1.1 * expected + 0.01
    assert np.log(limits.min()) - 3 >= 0.7 * expected
    assert upper_limit([2.0] * 20, sigma, 1.5) == pytest.approx(3.0)


@pytest.mark.parametrize(("slope", "lag"), [(0.01, 2), (-0.01, -50)])
def test_a_rising_level_is_followed_and_a_falling_one_not_ahead(slope: float, lag: int) -> None:
    values = np.exp(slope * np.arange(200)).tolist()
    assert upper_limit(values, 6.0, 1.5) == pytest.approx(
        1.5 * math.exp(slope * (199 + lag)), rel=0.01
    )


def test_a_resumed_guard_has_the_same_limits() -> None:
    guard = Guard(section(skip_spikes=True))
    for step in range(40):
        guard.check(step, result(math.sin(step) + 3), range(1))
    assert Guard(section(skip_spikes=True), [Applied(*entry) for entry in guard.recent]).limits(
        40
    ) == guard.limits(40)
    assert len(guard.recent) == 20 + 2


def test_a_spike_is_named_and_counts_only_when_it_was_left_out() -> None:
    for skip in (False, True):
        guard = Guard(
            section(skip_spikes=skip, max_skipped=0, spike_loss_factor=1.1, spike_norm_factor=1.5)
        )
        for step in range(22):
            assert guard.check(step, result(2.0), range(1)) is None
        assert guard.limits(22).loss == (pytest.approx(2.2) if skip else math.inf)
        if not skip:
            line = guard.check(22, result(2.3), range(60, 70))
            assert (
                line
                == "step 23: loss 2.3 is a spike, above 2.2 (train.spike_sigma); samples 60 to 69"
                " of the data order"
            )
            line = guard.check(23, result(2.0, 1.6), range(70, 80))
            assert line is not None and "gradient norm 1.6 is a spike, above 1.5 " in line
            continue
        with pytest.raises(
            RunError, match=r"loss 2.3 is a spike, .* 1 steps in a row updated nothing"
        ):
            guard.check(22, result(2.3, applied=False), range(60, 70))
        assert all(entry.loss < 2.3 for entry in guard.recent)


def test_no_rule_without_sigma_and_no_rule_of_this_rank_alone() -> None:
    guard = Guard(section(spike_sigma=None, skip_spikes=True))
    for step in range(22):
        guard.check(step, result(1.0), range(1))
    assert guard.limits(22) == Limits()
    line = guard.check(22, result(1.0, applied=False), range(2))
    assert line is not None and "left out because of another rank's numbers" in line


def test_a_run_that_leaves_out_spikes_resumes_with_the_same_numbers(workplace: Workplace) -> None:
    """A tight rule, so that it acts: some steps are left out, none of them differently after a
    resume.
    """
    factors = {"spike_loss_factor": 1.0, "spike_norm_factor": 1.0}
    train = {
        "steps": 32,
        "skip_spikes": True,
        "spike_sigma": 0.3,
        "spike_window": 20,
        "max_skipped": 16,
        **factors,
    }
    rarely = {
        "batch": {"global": 4, "micro": 4},
        "validation": {"every": 99, "windows": 8},
        "checkpoint": {"every": 25},
    }
    whole = workplace.config(
        "spikes.yaml", run={"dir": "spikes", "threads": 2}, train=train, **rarely
    )
    printed = workplace.run("pretrain", whole).stdout
    part = workplace.config(
        "spikes2.yaml", run={"dir": "spikes2", "threads": 2}, train=train | {"steps": 25}, **rarely
    )
    workplace.run("pretrain", part)
    workplace.run(
        "pretrain",
        workplace.config(
            "spikes2.yaml", run={"dir": "spikes2", "threads": 2}, train=train, **rarely
        ),
    )
    names = ("step", "loss", "grad_norm", "skipped")
    lines = [
        [{name: line[name] for name in names} for line in workplace.lines(run) if "loss" in line]
        for run in ("spikes", "spikes2")
    ]
    assert lines[0] == lines[1]
    skipped = [line["step"] for line in lines[0] if line["skipped"]]
    assert skipped and len(skipped) < 12
    assert (
        all(f"step {step}: " in printed for step in skipped)
        and "; the step updated nothing" in printed
    )
    other = train | {"spike_sigma": 5.0, "steps": 34}
    changed = workplace.config(
        "spikes2.yaml", run={"dir": "spikes2", "threads": 2}, train=other, **rarely
    )
    refused = workplace.run("pretrain", changed, code=2)
    assert "train.spike_sigma: 0.3 -> 5.0 has changed since" in refused.stderr

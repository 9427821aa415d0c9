"""Steps that are not finite or far above the recent ones: named, left out, counted."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada.engine.base import Limits, StepResult
from llada.errors import RunError
from llada.settings import TrainSection
from llada.training.guard import Applied, Guard
from tests.workplace import Workplace


def result(loss: float, norm: float = 1.0, applied: bool = True) -> StepResult:
    return StepResult(torch.tensor([loss, norm**2, float(not applied)], dtype=torch.float64))


def section(**changes: object) -> TrainSection:
    return TrainSection.model_validate({"steps": 100, "spike_window": 4, "spike_sigma": 3.0} | changes)


def test_too_many_steps_left_out_in_a_row_end_the_run_and_name_the_samples() -> None:
    guard, bad, good = Guard(section(max_skipped=2)), result(math.nan, applied=False), result(1.0)
    for step, each in enumerate([bad, bad, good, bad, bad]):
        guard.check(step, each, range(8 * step, 8 * step + 8))
    with pytest.raises(RunError, match=r"step 6: loss nan .* samples 40 to 47 .* 3 steps in a row .*train.max_skipped: 2"):
        guard.check(5, bad, range(40, 48))


@given(st.lists(st.floats(0.1, 10), min_size=12, max_size=12), st.integers(0, 11))
def test_limits_depend_on_the_steps_up_to_two_before_whenever_they_were_read(losses: list[float], early: int) -> None:
    """A GPU reports a step while it computes the next, except before a checkpoint: both must leave out the same steps."""
    guard = Guard(section(skip_spikes=True))
    for step, loss in enumerate(losses[: early + 1]):
        guard.check(step, result(loss, 2 * loss), range(1))
    window = losses[: max(0, early)][-4:]
    limits = guard.limits(early + 1)
    if len(window) < 4:
        assert limits == Limits()
    else:
        bound = statistics.fmean(window) + 3 * statistics.pstdev(window)
        assert limits == (pytest.approx(bound), pytest.approx(2 * bound))


def test_a_resumed_guard_has_the_same_limits() -> None:
    guard = Guard(section(skip_spikes=True))
    for step in range(20):
        guard.check(step, result(math.sin(step) + 3), range(1))
    assert Guard(section(skip_spikes=True), [Applied(*entry) for entry in guard.recent]).limits(20) == guard.limits(20)
    assert len(guard.recent) == 4 + 2


def test_a_spike_is_named_and_counts_only_when_it_was_left_out() -> None:
    for skip in (False, True):
        guard = Guard(section(skip_spikes=skip, max_skipped=0))
        for step in range(6):
            assert guard.check(step, result(2.0 + 0.1 * (step % 2)), range(1)) is None
        assert guard.limits(6).loss == (pytest.approx(2.05 + 3 * 0.05) if skip else math.inf)
        if not skip:
            line = guard.check(6, result(2.3), range(60, 70))
            assert line == "step 7: loss 2.3 is a spike, above 2.2 (train.spike_sigma); samples 60 to 69 of the data order"
            line = guard.check(7, result(2.0, 1.5), range(70, 80))
            assert line is not None and "gradient norm 1.5 is a spike, above 1 " in line
            continue
        with pytest.raises(RunError, match=r"loss 2.3 is a spike, .* 1 steps in a row updated nothing"):
            guard.check(6, result(2.3, applied=False), range(60, 70))
        assert all(entry.loss < 2.3 for entry in guard.recent)


def test_no_rule_without_sigma_and_no_rule_of_this_rank_alone() -> None:
    guard = Guard(section(spike_sigma=None, skip_spikes=True))
    for step in range(8):
        guard.check(step, result(1.0), range(1))
    assert guard.limits(8) == Limits()
    line = guard.check(8, result(1.0, applied=False), range(2))
    assert line is not None and "left out because of another rank's numbers" in line


def test_a_run_that_leaves_out_spikes_resumes_with_the_same_numbers(workplace: Workplace) -> None:
    """A tight rule, so that it acts: some steps are left out, none of them differently after a resume."""
    train = {"steps": 16, "skip_spikes": True, "spike_sigma": 0.3, "spike_window": 3, "max_skipped": 16}
    whole = workplace.config("spikes.yaml", run={"dir": "spikes", "threads": 2}, train=train)
    printed = workplace.run("pretrain", whole).stdout
    part = workplace.config("spikes2.yaml", run={"dir": "spikes2", "threads": 2}, train=train | {"steps": 9})
    workplace.run("pretrain", part)
    workplace.run("pretrain", workplace.config("spikes2.yaml", run={"dir": "spikes2", "threads": 2}, train=train))
    names = ("step", "loss", "grad_norm", "skipped")
    lines = [[{name: line[name] for name in names} for line in workplace.lines(run) if "loss" in line] for run in ("spikes", "spikes2")]
    assert lines[0] == lines[1]
    skipped = [line["step"] for line in lines[0] if line["skipped"]]
    assert skipped and len(skipped) < 14
    assert all(f"step {step}: " in printed for step in skipped) and "; the step updated nothing" in printed
    changed = workplace.config("spikes2.yaml", run={"dir": "spikes2", "threads": 2}, train=train | {"spike_sigma": 5.0, "steps": 18})
    refused = workplace.run("pretrain", changed, code=2)
    assert "train.spike_sigma: 0.3 -> 5.0 changed since" in refused.stderr

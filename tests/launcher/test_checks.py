"""Checks of a profile against a cluster, with a stand-in for Slurm's answer."""

from __future__ import annotations

from typing import Any

import pytest

from launch import slurm
from launch.profile import ClusterProfile
from launch.submit.checks import check_profile
from llada.errors import UserError
from tests.stand_ins import like


@pytest.fixture(autouse=True)
def partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"gpu": "2:00:00", "cpu": "1:00:00", "long": "infinite"}
    monkeypatch.setattr("launch.submit.checks.slurm", like(slurm, partitions=lambda: limits))


def check(**settings: Any) -> str | None:
    """The message of the check; None: it accepts the profile."""
    profile = ClusterProfile.model_validate({"partition": "gpu", "time": "02:00:00", **settings})
    try:
        check_profile(profile)
    except UserError as error:
        return str(error)
    return None


def test_a_profile_that_fits_is_accepted() -> None:
    assert check() is None
    assert check(cpu_jobs={"partition": "cpu", "time": "01:00:00"}) is None
    assert check(partition="long", time="30-00:00:00") is None


def test_an_unknown_partition_is_refused_with_the_nearest_name() -> None:
    message = (
        "partition: Slurm has no partition 'gpus' (did you mean 'gpu'?); there are cpu, gpu, long"
    )
    assert check(partition="gpus") == message
    assert check(cpu_jobs={"partition": "gpus"}) == f"cpu_jobs.{message}"


def test_the_time_of_cpu_jobs_is_compared_with_the_partition_that_they_get() -> None:
    message = check(cpu_jobs={"time": "03:00:00"})
    assert message is not None
    assert message.startswith(
        "cpu_jobs.time: '03:00:00' is over the limit 2:00:00 of partition 'gpu'"
    )
    # Without a time of their own, these jobs ask for that of training.
    message = check(cpu_jobs={"partition": "cpu"})
    assert message is not None
    assert message.startswith(
        "cpu_jobs.time: '02:00:00' is over the limit 1:00:00 of partition 'cpu'"
    )


def test_a_quality_of_service_of_cpu_jobs_may_allow_more_than_their_partition() -> None:
    longer = {"partition": "cpu", "time": "03:00:00"}
    assert check(cpu_jobs=longer) is not None
    assert check(cpu_jobs={**longer, "qos": "long"}) is None
    # That of training is theirs too, unless they have their own.
    assert check(qos="long", cpu_jobs=longer) is None

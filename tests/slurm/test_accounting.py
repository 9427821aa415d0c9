"""With slurmdbd: accounts are checked, and jobs that slurmctld has forgotten are still known."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import slurm
from llada.errors import UserError
from tests.slurm.cluster import Cluster, until
from tests.slurm.island import Island, commands_talk_to
from tests.stand_ins import like


@pytest.fixture(scope="module")
def accounted(disk: Path, corpus: Path) -> Iterator[Island]:
    """A cluster of two nodes with accounting that forgets finished jobs after some seconds."""
    cluster = Cluster(disk / "accounted", index=1, nodes=2, accounting=True, forget_seconds=5)
    try:
        with commands_talk_to(cluster.start(), corpus):
            yield Island(corpus, cluster)
    finally:
        cluster.stop()


def test_an_account_that_is_none_is_refused(accounted: Island) -> None:
    with pytest.raises(
        UserError,
        match="Slurm refuses the job: Invalid account or account/partition combination specified",
    ):
        accounted.launch("unpaid", profile=accounted.profile("wrong", account="scince"))


def test_a_job_that_slurm_forgot_is_known_from_accounting(accounted: Island) -> None:
    profile = accounted.profile(
        "paid", account="science", environment={"source": ["/nowhere/activate"]}
    )
    job = accounted.launch("forgotten", profile=profile)
    until(lambda: not slurm.show_job(job), 90, "slurmctld to forget the job")
    status = accounted.status("forgotten")
    assert status.state == "FAILED" and status.jobs == [f"{job} FAILED"]
    assert status.reason == f"Slurm says FAILED of job {job}"
    assert "/nowhere/activate" in accounted.llada("logs", "forgotten")
    assert slurm.find_jobs([job, "4000000"])["4000000"].state == "UNKNOWN"


def test_without_accounting_it_says_so(accounted: Island, monkeypatch: pytest.MonkeyPatch) -> None:
    job = accounted.cluster.run(
        "sbatch", "--parsable", "--account=science", "--output=/dev/null", "--wrap", "true"
    )
    until(lambda: not slurm.show_job(job), 90, "slurmctld to forget the job")
    assert slurm.find_jobs([job])[job].state == "COMPLETED"
    without_sacct = like(shutil, which=lambda name: None if name == "sacct" else shutil.which(name))
    monkeypatch.setattr(slurm, "shutil", without_sacct)
    assert slurm.find_jobs([job])[job].state == "UNKNOWN"

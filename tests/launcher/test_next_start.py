"""What a job tells Slurm about later starts, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.job.next_start import NextStart, latest_nodes
from launch.job.policy import Decision
from launch.job.spec import SUBMITTED_FILE, JobSpec, Submitted
from llada.events import EventLog


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for every command that changes something in Slurm.

    The partition has four nodes.
    """
    calls = tmp_path / "calls"
    calls.touch()
    show_job = 'if [ "$1" = --oneliner ]; then echo Partition=gpu; exit; fi'
    scripts = {
        "scontrol": f'{show_job}\necho "$@" >>{calls}',
        "scancel": f'echo scancel "$@" >>{calls}',
        "sinfo": 'for node in n0 n1 n2 n3; do echo "$node"; done',
    }
    for name, line in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return calls


def next_start(folder: Path, *jobs: str, then: str | None = None) -> NextStart:
    """The next start after job 12, which needs two nodes."""
    (folder / SUBMITTED_FILE).write_text(Submitted([*jobs], then).to_json())
    spec = JobSpec("train", str(folder), str(folder), str(folder), [], "python", nodes=2)
    return NextStart("12", spec, folder)


def test_a_job_that_is_requeued_waits_for_the_back_off(tmp_path: Path, commands: Path) -> None:
    assert next_start(tmp_path, "12").requeue(Decision("requeued", "why", delay=60.0)) is None
    assert commands.read_text().splitlines() == [
        "requeue 12",
        "update JobId=12 StartTime=now+60",
    ]


def test_a_requeued_job_avoids_the_bad_nodes_of_the_last_day(
    tmp_path: Path, commands: Path
) -> None:
    EventLog(tmp_path).write("requeued", excluded=["n1"])
    next_start(tmp_path, "12").requeue(Decision("requeued", "why", exclude=["n3"]))
    assert commands.read_text().splitlines()[1:] == ["update JobId=12 ExcNodeList=n1,n3"]


def test_the_back_off_is_for_the_next_job_of_a_chain_and_bad_nodes_are_for_all(
    tmp_path: Path, commands: Path
) -> None:
    chain = next_start(tmp_path, "11", "12", "13", "14")
    assert chain.leave_to_chain(Decision("requeued", "why", delay=60.0)) == "13"
    assert chain.leave_to_chain(Decision("requeued", "why", exclude=["n1"])) == "13"
    assert commands.read_text().splitlines() == [
        "update JobId=13 StartTime=now+60",
        "update JobId=13 ExcNodeList=n1",
        "update JobId=14 ExcNodeList=n1",
    ]


def test_nothing_follows_the_last_job_of_a_chain(tmp_path: Path, commands: Path) -> None:
    decision = Decision("requeued", "why", delay=60.0)
    assert next_start(tmp_path, "11", "12").leave_to_chain(decision) is None
    assert commands.read_text() == ""


@pytest.mark.parametrize("finished", [True, False])
def test_the_end_of_a_run_cancels_the_rest_of_its_chain(
    tmp_path: Path, commands: Path, finished: bool
) -> None:
    """The conversion waits for the last job, unless another one finishes the run."""
    next_start(tmp_path, "11", "12", "13", then="14").end_chain(finished)
    update = ["update JobId=14 Dependency=afterok:12"] if finished else []
    assert commands.read_text().splitlines() == [*update, "scancel 11 13"]


def test_a_run_of_one_job_has_no_chain_to_end(tmp_path: Path, commands: Path) -> None:
    next_start(tmp_path, "12", then="14").end_chain(finished=True)
    assert commands.read_text() == ""


def test_no_more_nodes_are_excluded_than_can_be_spared() -> None:
    assert latest_nodes(["n1", "n2", "n3", "n1"], spare=None) == ["n2", "n3", "n1"]
    assert latest_nodes(["n1", "n2", "n3", "n1"], spare=2) == ["n3", "n1"]
    assert latest_nodes(["n1", "n2"], spare=0) == []

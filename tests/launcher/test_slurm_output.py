"""What Slurm's commands print and mean, and what is done while they do not answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch import slurm
from launch.job.own_job import _seconds
from launch.slurm import Job
from launch.status import _explain_pending
from llada.errors import UserError


def test_durations_of_a_job() -> None:
    texts = {"00:01:00": 60, "1-02:03:04": 93784, "05:06": 306, "UNLIMITED": 0}
    assert {text: _seconds({"TimeLimit": text}, "TimeLimit") for text in texts} == texts
    assert _seconds({}, "TimeLimit") == 0


def test_the_reason_of_a_pending_job_is_explained() -> None:
    too_long = _explain_pending(Job("1", "PENDING", "PartitionTimeLimit"))
    assert too_long is not None
    assert too_long.startswith("PartitionTimeLimit (requests more time than the partition")
    assert _explain_pending(Job("1", "PENDING", "ReqNodeNotAvail, UnavailableNodes:n1")) == (
        "ReqNodeNotAvail, UnavailableNodes:n1 (a node it needs is down, drained or reserved)"
    )
    assert _explain_pending(Job("1", "PENDING", "SomethingNew")) == "SomethingNew"
    assert _explain_pending(Job("1", "RUNNING")) is None


def test_no_slurm_on_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"launch: no Slurm on this machine .* or start the run here with --local"
    ):
        slurm.require()


def test_a_job_waits_for_an_unreachable_controller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run must not end because slurmctld was being restarted when it requeued itself.

    The clock is a list.
    """
    script = tmp_path / "scontrol"
    unreachable = "slurm_requeue error: Unable to contact slurm controller (connect failure)"
    script.write_text(
        f"#!/bin/sh\necho x >>{tmp_path}/calls\n[ $(wc -l <{tmp_path}/calls) -gt 3 ] || {{ echo"
        f' "{unreachable}" >&2; exit 1; }}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slept: list[float] = []
    assert slurm.requeue("12", sleep=slept.append) is None and slept == [5.0] * 3
    (tmp_path / "calls").unlink()
    # Whoever looks from outside is told at once.
    assert (
        slurm.run_command("scontrol", "show", "job", "12", sleep=slept.append).returncode == 1
        and len(slept) == 3
    )
    script.write_text(
        "#!/bin/sh\necho 'slurm_requeue error: Job is no longer pending execution' >&2; exit 1\n"
    )
    assert slurm.requeue("12") == "Job is no longer pending execution"

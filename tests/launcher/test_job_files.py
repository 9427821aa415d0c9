"""The files that a launch and its job exchange, and how folders are numbered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.job.spec import JobSpec, Restarts, latest_checkpoint, make_numbered_folder

ROOT = Path(__file__).parents[2]


def test_job_descriptions_go_through_the_file(tmp_path: Path) -> None:
    spec = JobSpec(
        "train",
        "/s",
        "/d",
        "/c",
        ["pretrain", "x"],
        "python",
        nodes=2,
        tasks_per_node=4,
        preflight={"gpus": 1},
        restarts=Restarts(limit=7),
    )
    (tmp_path / "job.json").write_text(spec.to_json())
    assert JobSpec.read(tmp_path) == spec and spec.ranks == 8


def test_folders_are_numbered_without_gaps_being_filled(tmp_path: Path) -> None:
    assert [make_numbered_folder(tmp_path, "attempt-{:04d}")[0] for _ in range(3)] == [1, 2, 3]
    (tmp_path / "attempt-0002").rmdir()
    (tmp_path / "job-17.log").touch()
    assert make_numbered_folder(tmp_path, "attempt-{:04d}")[1].name == "attempt-0004"


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) == 0
    for name, complete in (
        ("step_00000005", True),
        ("step_00000010", True),
        ("step_00000015", False),
        ("step_00000020.rewound-1", True),
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if complete:
            (tmp_path / "checkpoints" / name / "COMMITTED").touch()
    assert latest_checkpoint(tmp_path) == 10


@pytest.mark.parametrize("module", ["launch.job.main", "launch.job.supervisor", "launch.job.rank"])
def test_the_job_imports_the_standard_library_alone(module: str) -> None:
    """The batch script starts before the environment of the ranks is there."""
    code = (
        f"import sys; before = set(sys.modules); import {module}\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    output = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "['launch', 'llada']"

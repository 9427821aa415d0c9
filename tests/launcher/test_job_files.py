"""The files that a launch and its job exchange, and how folders are numbered."""

from __future__ import annotations

from pathlib import Path

from launch.job.spec import JobSpec, Restarts, latest_checkpoint, make_numbered_folder


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

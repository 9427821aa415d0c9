"""Profiles of clusters: what they refuse, and what they become in a batch script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.profile import ClusterProfile, load_profile, minutes
from launch.submit.sbatch import TrainingRequest, job_name, single_job, training_job
from llada.config import RunConfig
from llada.errors import UserError
from llada.training.configure import load_config
from tests.workplace import CONFIG

PROFILES = sorted((Path(__file__).parents[2] / "configs" / "clusters").glob("*.yaml"))


def load(tmp_path: Path, *overrides: str, **settings: Any) -> ClusterProfile:
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump({"time": "01:00:00", **settings}))
    return load_profile(tmp_path / "profile.yaml", list(overrides))


def run(tmp_path: Path, **sections: Any) -> RunConfig:
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({**CONFIG, "run": {"dir": str(tmp_path / "run")}, **sections})
    )
    return load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_shipped_profiles(path: Path, tmp_path: Path) -> None:
    profile = load_profile(path)
    request = TrainingRequest(nodes=32, ranks_per_node=8)
    script = training_job(run(tmp_path), profile, request, tmp_path / "launch").script()
    assert "#SBATCH --nodes=32" in script and "#SBATCH --ntasks-per-node=8" in script
    assert f"#SBATCH --account={profile.account}" in script


@pytest.mark.parametrize(
    "text, expected",
    [
        ("90", 90),
        ("1:30", 2),
        ("02:00:00", 120),
        ("1-00", 1440),
        ("1-12:30", 2190),
        ("1-00:00:01", 1441),
        ("7-00:00:00", 10080),
    ],
)
def test_time_limits_are_written_as_for_slurm(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"partiton": "gpu"}, "partiton: unknown setting (did you mean 'partition'?)"),
        ({"requeue": {"limt": 3}}, "requeue.limt: unknown setting (did you mean 'requeue.limit'?)"),
        (
            {"environment": {"container": {"kind": "docker", "image": "x"}}},
            "environment.container.kind: 'docker' is not allowed",
        ),
        (
            {"time": "an hour"},
            "time: 'an hour' is not a duration; write D-HH:MM:SS, HH:MM:SS or minutes",
        ),
        (
            {"time": 43200},
            (
                "time: 43200 is a number to YAML, even where 12:00:00 was written; put the time in"
                " quotes"
            ),
        ),
        ({"cpu_jobs": {"time": 43200}}, "cpu_jobs.time: 43200 is a number to YAML"),
        ({"time": "5", "signal_seconds": 300}, "signal_seconds: 300 is not less than time = 5"),
        ({"sbatch": {"nodes": "4"}}, "sbatch: nodes is set by the launcher; leave it out"),
        (
            {"sbatch": {"ntasks_per_node": 4}},
            "sbatch: ntasks_per_node is set by the launcher; leave it out",
        ),
        ({"gpu_request": "gpu"}, "gpu_request: 'gpu' is not allowed"),
        (
            {"preflight": {"slow_factor": 1.0}},
            "preflight.slow_factor: 1.0 is not allowed: input should be greater than 1",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, **settings)
    assert str(caught.value).startswith(f"--cluster {tmp_path / 'profile.yaml'}: {message}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_a_profile(tmp_path: Path) -> None:
    load(tmp_path)
    with pytest.raises(
        UserError, match=r"--cluster: no file '.*profil.yaml' \(did you mean '.*profile.yaml'\?\)"
    ):
        load_profile(tmp_path / "profil.yaml")
    (tmp_path / "broken.yaml").write_text("time: [")
    with pytest.raises(UserError, match=r"--cluster: .*broken.yaml is not valid YAML"):
        load_profile(tmp_path / "broken.yaml")


def test_every_setting_reaches_the_script(tmp_path: Path) -> None:
    profile = load(
        tmp_path,
        "time=12:30:00",
        partition="gpu,spare",
        account="a",
        qos="q",
        constraint="nvlink&ib",
        reservation="r",
        exclusive=True,
        exclude=["n1", "n2"],
        gpu_request="gres",
        gpu_type="a100",
        cpus_per_task=6,
        memory_per_task_gb=10,
        network_interface="ib0",
        srun=["--mpi=none"],
        sbatch={"mail-type": "FAIL", "nice": 100},
        environment={
            "modules": ["cuda/12.4", "odd name"],
            "source": ["/opt/my env/activate"],
            "variables": {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": 4},
            "container": {"kind": "pyxis", "image": "/i.sqsh", "mounts": ["/a:/a", "/b:/b"]},
            "python": "python",
        },
    )
    request = TrainingRequest(nodes=2, ranks_per_node=4, arguments=["--allow-changed"])
    job = training_job(run(tmp_path, parallel={"tensor": 2}), profile, request, tmp_path / "l")
    lines = job.script().splitlines()
    for option in (
        "--time=750",
        "--partition=gpu,spare",
        "--account=a",
        "--qos=q",
        "--constraint='nvlink&ib'",
        "--reservation=r",
        "--exclusive",
        "--exclude=n1,n2",
        "--gres=gpu:a100:4",
        "--cpus-per-task=6",
        "--mem=40960M",
        "--mail-type=FAIL",
        "--nice=100",
        "--requeue",
        "--signal=B:USR1@300",
        f"--output={tmp_path / 'run/logs/job-%j.log'}",
    ):
        assert f"#SBATCH {option}" in lines
    assert (
        "module load cuda/12.4 || exit 1" in lines and "module load 'odd name' || exit 1" in lines
    )
    assert ". '/opt/my env/activate' || exit 1" in lines
    spec = job.spec
    assert spec.srun == [
        "--cpus-per-task=6",
        "--container-image=/i.sqsh",
        f"--container-workdir={tmp_path}/l/code",
        "--container-mounts=/a:/a,/b:/b",
        "--mpi=none",
    ]
    assert spec.python == "python"
    assert spec.environment["NCCL_DEBUG"] == "INFO" and spec.environment["OMP_NUM_THREADS"] == "4"
    assert spec.environment["NCCL_SOCKET_IFNAME"] == spec.environment["GLOO_SOCKET_IFNAME"] == "ib0"
    assert spec.environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert (
        spec.command == ["pretrain", str(tmp_path / "l/config.yaml"), "--allow-changed"]
        and spec.ranks == 8
    )


def test_chains_and_containers(tmp_path: Path) -> None:
    profile = load(
        tmp_path,
        environment={"container": {"kind": "apptainer", "image": "/i.sif", "mounts": ["/a"]}},
        memory_per_task_gb=0,
    )
    request = TrainingRequest(ranks_per_node=2, chain=3)
    job = training_job(run(tmp_path), profile, request, tmp_path / "l")
    assert "#SBATCH --no-requeue" in job.script() and "#SBATCH --mem=0" in job.script()
    assert not job.spec.restarts.requeue and job.spec.chain == 3
    assert job.spec.container == [
        "apptainer",
        "exec",
        "--nv",
        "--pwd",
        str(tmp_path / "l/code"),
        "--bind",
        "/a",
        "/i.sif",
    ]
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in job.spec.environment


def test_jobs_without_gpus_have_their_own_settings(tmp_path: Path) -> None:
    profile = load(
        tmp_path,
        partition="gpu",
        account="a",
        cpu_jobs={"partition": "cpu", "time": "10", "cpus": 3, "memory_gb": 1.5},
    )
    command = ["data", "prepare", "--task", "{task}"]
    job = single_job(profile, Path("/s"), Path("/f"), Path("/c"), command, tasks=5)
    for option in (
        "--partition=cpu",
        "--account=a",
        "--time=10",
        "--cpus-per-task=3",
        "--mem=1536M",
        "--array=0-4",
        "--nodes=1",
    ):
        assert f"#SBATCH {option}" in job.script().splitlines()
    assert "gpu" not in job.script()


def test_jobs_of_two_runs_have_different_names() -> None:
    assert job_name(Path("/a/run")) != job_name(Path("/b/run"))
    assert job_name(Path("/a/my run!")).startswith("llada-my_run_-")

"""Cores, ports, records, and what is made of Slurm's answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import slurm as scheduler
from launch import status
from launch.job import affinity
from launch.job.machines import OneProcess, free_port
from launch.job.rank import last_message
from launch.job.spec import JobSpec, Restarts, latest_checkpoint, next_folder
from launch.job.supervisor import _seconds
from launch.slurm import Job
from llada.errors import UserError

ROOT = Path(__file__).parents[2]


@given(st.sets(st.integers(0, 300)))
def test_cpu_lists(cpus: set[int]) -> None:
    text = ",".join(str(cpu) for cpu in sorted(cpus))
    assert affinity.parse_cpu_list(text) == cpus
    assert affinity.parse_cpu_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}


def test_ranks_are_dealt_out_over_numa_nodes(tmp_path: Path) -> None:
    for node, cpus in enumerate(("0-3", "4-7")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus)
    assert [affinity.cpus_of_numa_node(rank, 4, tmp_path) for rank in range(4)] == [
        {0, 1, 2, 3}
    ] * 2 + [{4, 5, 6, 7}] * 2
    assert affinity.cpus_of_numa_node(0, 1, tmp_path / "none") == set()


def test_cores_near_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 00000000:1B:00.0\necho 00000000:9D:00.0\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "0000:9d:00.0").mkdir()
    (tmp_path / "0000:9d:00.0" / "local_cpulist").write_text("24-47\n")
    assert affinity.cpus_near_gpu(1, tmp_path) == set(range(24, 48))
    assert affinity.cpus_near_gpu(0, tmp_path) == set()


def test_a_port_that_is_taken_is_not_chosen() -> None:
    port = free_port(7)
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        assert free_port(7) != port
    assert free_port(7) != free_port(8)


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


def test_only_the_parent_of_a_rank_enters_the_container(tmp_path: Path) -> None:
    """A stand-in for apptainer that is not there inside: called twice, it would not be found."""
    inside = tmp_path / "inside"
    inside.mkdir()
    stand_in = tmp_path / "apptainer"
    stand_in.write_text(
        f'#!/bin/sh\nwhile [ "$1" != image ]; do shift; done; shift\nPATH={inside}:/usr/bin:/bin'
        ' exec "$@"\n'
    )
    stand_in.chmod(0o755)
    spec = JobSpec(
        "task",
        str(tmp_path),
        str(tmp_path),
        str(ROOT),
        [],
        sys.executable,
        ["apptainer", "exec", "--nv", "image"],
    )
    command = [sys.executable, "-c", "import os; print(os.environ['PATH'])"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    before = os.environ["PATH"]
    os.environ["PATH"] = path
    try:
        process = OneProcess(spec).start(command, 1, tmp_path, {})
        assert process.wait(30) == 0
    finally:
        os.environ["PATH"] = before
    assert (tmp_path / "rank_00000.log").read_text().startswith(str(inside))


def test_folders_are_numbered_without_gaps_being_filled(tmp_path: Path) -> None:
    assert [next_folder(tmp_path, "attempt-{:04d}")[0] for _ in range(3)] == [1, 2, 3]
    (tmp_path / "attempt-0002").rmdir()
    (tmp_path / "job-17.log").touch()
    assert next_folder(tmp_path, "attempt-{:04d}")[1].name == "attempt-0004"


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


def test_slurms_durations() -> None:
    assert [_seconds(text) for text in ("00:01:00", "1-02:03:04", "05:06", "UNLIMITED", None)] == [
        60,
        93784,
        306,
        0,
        0,
    ]


def test_the_reason_of_a_pending_job_is_explained() -> None:
    assert status._because(Job("1", "PENDING", "PartitionTimeLimit")).startswith(
        ": PartitionTimeLimit (asks for more time than the partition"
    )
    assert status._because(Job("1", "PENDING", "ReqNodeNotAvail, UnavailableNodes:n1")).endswith(
        "(a node it needs is down, drained or reserved)"
    )
    assert status._because(Job("1", "PENDING", "SomethingNew")) == ": SomethingNew"
    assert status._because(Job("1", "RUNNING")) == ""


def test_no_slurm_on_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"launch: no Slurm on this machine .* or start the run here with --local"
    ):
        scheduler.require()


def test_a_job_waits_for_a_controller_that_is_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run must not end because slurmctld was being restarted when it wanted back into the queue;
    the clock is a list.
    """
    script = tmp_path / "scontrol"
    away = "slurm_requeue error: Unable to contact slurm controller (connect failure)"
    script.write_text(
        f"#!/bin/sh\necho x >>{tmp_path}/calls\n[ $(wc -l <{tmp_path}/calls) -gt 3 ] || {{ echo"
        f' "{away}" >&2; exit 1; }}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slept: list[float] = []
    assert scheduler.requeue("12", sleep=slept.append) is None and slept == [5.0] * 3
    (tmp_path / "calls").unlink()
    # Whoever looks from outside is told at once.
    assert (
        scheduler.call("scontrol", "show", "job", "12", sleep=slept.append).returncode == 1
        and len(slept) == 3
    )
    script.write_text(
        "#!/bin/sh\necho 'slurm_requeue error: Job is no longer pending execution' >&2; exit 1\n"
    )
    assert scheduler.requeue("12") == "Job is no longer pending execution"


def test_the_last_word_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_message(log) is None
    log.write_text(
        "step 1\nfailed: first\nTraceback\nfailed: loss is not finite\n[rank0]: something after"
        " it\n"
    )
    assert last_message(log) == "failed: loss is not finite"


def start_rank(folder: Path, code: str, *options: str) -> subprocess.Popen[bytes]:
    words = [
        sys.executable,
        "-m",
        "launch.job.rank",
        "--folder",
        str(folder),
        "--directory",
        str(folder),
        *options,
        "--",
        sys.executable,
        "-c",
        code,
    ]
    place = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "LLADA_LOCAL": "1",
    }
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **place})


def exit_record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "rank_00003.exit.json").read_text())
    return found


@pytest.mark.parametrize(
    "code, recorded, returned",
    [
        ("pass", 0, 0),
        ("import sys; sys.exit(75)", 75, 0),
        ("import sys; print('error: x: y', file=sys.stderr); sys.exit(2)", 2, 1),
        ("import os; os.kill(os.getpid(), 9)", -9, 1),
    ],
)
def test_every_end_of_a_rank_is_recorded(
    tmp_path: Path, code: str, recorded: int, returned: int
) -> None:
    assert start_rank(tmp_path, code).wait(30) == returned
    record = exit_record(tmp_path)
    assert (record["code"], record["host"]) == (recorded, socket.gethostname())
    assert record["message"] == ("error: x: y" if recorded == 2 else None)
    assert json.loads((tmp_path / "rank_00003.start.json").read_text())["pid"] > 0


def test_a_signal_is_repeated_until_the_rank_handles_it(tmp_path: Path) -> None:
    slow = "import signal, sys, time; time.sleep(1.5); "
    code = (
        slow + "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); open('ready', 'w');"
        " time.sleep(20)"
    )
    rank = start_rank(tmp_path, code)
    while not (tmp_path / "rank_00003.start.json").exists():
        time.sleep(0.02)
    rank.send_signal(signal.SIGUSR1)  # the child ignores it: it still "imports"
    assert (
        rank.wait(30) == 0 and (tmp_path / "ready").exists() and exit_record(tmp_path)["code"] == 75
    )


def test_a_task_that_handles_no_signal_ends_by_it(tmp_path: Path) -> None:
    rank = start_rank(
        tmp_path, "import time; open('ready', 'w'); time.sleep(60)", "--default-signals"
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(30) == 1 and exit_record(tmp_path)["code"] == -signal.SIGTERM


def test_a_rank_does_not_outlive_its_parent(tmp_path: Path) -> None:
    rank = start_rank(
        tmp_path, "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    rank.kill()
    rank.wait()
    deadline = time.monotonic() + 10
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_the_environment_of_a_rank_is_of_slurm_even_where_torchrun_left_its_own(
    tmp_path: Path,
) -> None:
    code = (
        "import json, os; print(json.dumps({k: os.environ[k] for k in ('RANK', 'WORLD_SIZE',"
        " 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')}))"
    )
    words = [
        sys.executable,
        "-m",
        "launch.job.rank",
        "--folder",
        str(tmp_path),
        "--directory",
        str(tmp_path),
        "--",
        sys.executable,
        "-c",
        code,
    ]
    stale = {"RANK": "9", "WORLD_SIZE": "99", "LOCAL_RANK": "9", "LOCAL_WORLD_SIZE": "9"}
    slurm = {
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "6",
        "SLURM_STEP_NUM_NODES": "3",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }
    subprocess.run(words, cwd=ROOT, env={**os.environ, **stale, **slurm}, check=True)
    found = json.loads((tmp_path / "rank_00005.log").read_text())
    assert found == {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}

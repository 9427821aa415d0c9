"""The parent process of a rank: records, signals, environment, container and port."""

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

from launch.job.machines import OneProcess, RankCommand, free_port
from launch.job.rank import last_message
from launch.job.spec import JobSpec
from llada.failures import REPORT_VARIABLE, read_report
from tests import processes

ROOT = Path(__file__).parents[2]


def test_a_port_that_is_taken_is_not_chosen() -> None:
    port = free_port(7)
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        assert free_port(7) != port
    assert free_port(7) != free_port(8)


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
        process = OneProcess(spec).start(RankCommand(command, 1, tmp_path))
        assert process.wait(30) == 0
    finally:
        os.environ["PATH"] = before
    assert (tmp_path / "rank_00000.log").read_text().startswith(str(inside))


def test_the_last_message_of_a_log(tmp_path: Path) -> None:
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
    variables = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "LLADA_LOCAL": "1",
        # What is there stays: a planted mistake must reach these processes.
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **variables})


def exit_record(folder: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((folder / "rank_00003.exit.json").read_text())
    return record


REPORT_STEP = "from llada import failures; failures.report('step', 812); raise SystemExit(1)"
REPORT_NONSENSE = (
    "import os; open(os.environ['LLADA_FAILURE_FILE'], 'w').write('{torn'); raise SystemExit(1)"
)
REPORT_HANG = "from llada import failures; failures.report('hang'); raise SystemExit(75)"


@pytest.mark.parametrize(
    "code, recorded, kind, returned",
    [
        ("pass", 0, None, 0),
        ("import sys; sys.exit(75)", 75, None, 0),
        ("import sys; print('error: x: y', file=sys.stderr); sys.exit(2)", 2, "user_error", 1),
        ("import os; os.kill(os.getpid(), 9)", -9, "killed", 1),
        ("raise OSError('disk')", 1, "exception", 1),
        (REPORT_STEP, 1, "step", 1),
        (REPORT_HANG, 75, "hang", 0),
        (REPORT_NONSENSE, 1, "exception", 1),
    ],
)
def test_every_end_of_a_rank_is_recorded(
    tmp_path: Path, code: str, recorded: int, kind: str | None, returned: int
) -> None:
    assert start_rank(tmp_path, code).wait(30) == returned
    record = exit_record(tmp_path)
    assert (record["code"], record["host"]) == (recorded, socket.gethostname())
    assert record["message"] == ("error: x: y" if recorded == 2 else None)
    assert record["kind"] == kind
    assert record.get("training_step") == (812 if kind == "step" else None)
    assert not list(tmp_path.glob("*.failure"))
    assert json.loads((tmp_path / "rank_00003.start.json").read_text())["pid"] > 0


@pytest.mark.parametrize(
    "error, kind, step",
    [
        ("llada.errors.StepError('worded differently', step=812)", "step", 812),
        ("ConnectionResetError('worded differently')", "lost_peer", None),
        ("torch.distributed.DistBackendError('worded differently')", "lost_peer", None),
        ("torch.distributed.DistNetworkError('worded differently')", "lost_peer", None),
        ("RuntimeError('worded differently')", None, None),
        ("OSError('worded differently')", None, None),
    ],
)
def test_a_command_reports_its_failure_by_the_type_of_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, kind: str | None, step: int | None
) -> None:
    report = tmp_path / "report"
    monkeypatch.setenv(REPORT_VARIABLE, str(report))
    code = (
        "import torch.distributed, llada.errors, llada.cli as cli\ndef fail(**_):\n    raise "
        f"{error}\ncli.app = fail\ncli.main()"
    )
    process = processes.start("-c", code, cwd=ROOT, env=dict(os.environ))
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 1 and "worded differently" in errors
    reported = read_report(report)
    if kind is None:
        assert reported is None
    else:
        assert reported is not None and reported == (kind, step)


def test_a_signal_is_repeated_until_the_rank_handles_it(tmp_path: Path) -> None:
    slow = "import signal, sys, time; time.sleep(1.5); "
    code = (
        slow + "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); open('ready', 'w');"
        " time.sleep(20)"
    )
    rank = start_rank(tmp_path, code, "--ignore-early-signals")
    while not (tmp_path / "rank_00003.start.json").exists():
        time.sleep(0.02)
    rank.send_signal(signal.SIGUSR1)  # the child ignores it: it still "imports"
    assert (
        rank.wait(30) == 0 and (tmp_path / "ready").exists() and exit_record(tmp_path)["code"] == 75
    )


def test_a_task_that_handles_no_signal_ends_by_it(tmp_path: Path) -> None:
    rank = start_rank(tmp_path, "import time; open('ready', 'w'); time.sleep(60)")
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
    variables = json.loads((tmp_path / "rank_00005.log").read_text())
    assert variables == {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}

"""One run folder, one writer: the holder is named, and one that is gone is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llada.errors import UserError
from llada.training import lock
from llada.training.lock import RunLock
from tests.training.locks import forge_lock

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from llada.training.lock import RunLock
RunLock(Path(sys.argv[1]), 0.2)
print("held", flush=True)
time.sleep(60)
"""


def start_holder(folder: Path, **environment: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_is_refused_and_the_holder_named(tmp_path: Path) -> None:
    holder = start_holder(tmp_path, SLURM_JOB_ID="4711")
    try:
        with pytest.raises(UserError) as caught:
            RunLock(tmp_path, 0.2)
        assert str(caught.value).startswith(
            f"run.dir: '{tmp_path}' is in use by job 4711, process {holder.pid} on host"
            f" {os.uname().nodename} since "
        )
        assert lock.holding_process(tmp_path) == (os.uname().nodename, holder.pid)
    finally:
        holder.kill()
        holder.wait()


def test_a_killed_holder_is_replaced_at_once(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    holder.kill()
    holder.wait()
    assert lock.describe_holder(tmp_path) is None
    began = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - began < 2 and list(tmp_path.iterdir()) == []


def test_another_process_with_the_holders_number_is_not_taken_for_it(tmp_path: Path) -> None:
    forge_lock(tmp_path, host=os.uname().nodename, pid=os.getppid(), born="another boot:1")
    RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_silent_holder_of_another_host_is_replaced_when_it_is_stale(tmp_path: Path) -> None:
    forge_lock(tmp_path)
    began = time.monotonic()
    RunLock(tmp_path, beat=0.2, stale=1.0).release()
    assert 0.5 < time.monotonic() - began < 5


def test_an_earlier_attempt_of_the_same_job_is_replaced_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge_lock(tmp_path, job="12", attempt="1")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("LLADA_ATTEMPT", "2")
    began = time.monotonic()
    RunLock(tmp_path).release()
    assert time.monotonic() - began < 2
    # Two steps of one allocation are not attempts of each other.
    holder = start_holder(tmp_path)
    try:
        monkeypatch.delenv("LLADA_ATTEMPT")
        with pytest.raises(UserError, match="is in use by job 12"):
            RunLock(tmp_path, 0.2)
    finally:
        holder.kill()
        holder.wait()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    forge_lock(tmp_path, host=os.uname().nodename, pid=os.getpid() + 10**6)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    many = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    try:
        deadline = time.monotonic() + 30
        while sum(process.poll() is None for process in many) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        alive = [process for process in many if process.poll() is None]
        assert len(alive) == 1
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == alive[0].pid
    finally:
        for process in many:
            process.kill()
            process.communicate()


def test_who_lost_the_folder_does_not_go_on(tmp_path: Path) -> None:
    """Frozen for so long that another took over: writing on would mix two runs."""
    holder = start_holder(tmp_path)
    forge_lock(tmp_path, pid=77, since="now")
    assert holder.wait(10) == 1


@pytest.mark.parametrize("content", ['{"host": "n', "", "\0" * 80], ids=["torn", "empty", "zeros"])
def test_a_torn_lock_is_waited_out(content: str, tmp_path: Path) -> None:
    (tmp_path / lock.NAME).write_text(content)
    RunLock(tmp_path, beat=0.2, stale=0.5).release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("a folder", None),
        ("a file that no run wrote", "key: value"),
        ("a pipe, a socket or a device", None),
    ],
)
def test_a_lock_that_no_run_left_is_refused_and_kept(
    what: str, content: str | None, tmp_path: Path
) -> None:
    path = tmp_path / lock.NAME
    if what == "a folder":
        path.mkdir()
    elif content is None:
        os.mkfifo(path)
    else:
        path.write_text(content)
    with pytest.raises(
        UserError,
        match=(
            f"^run.dir: '{path}' is {what}, and a run keeps its lock there; move it away, or choose"
        ),
    ):
        RunLock(tmp_path)
    assert not path.is_file() if content is None else path.read_text() == content
    assert lock.describe_holder(tmp_path) is None


def test_a_lock_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    """A lock cannot be created beside it, and there is nothing whose age could be waited for."""
    (tmp_path / lock.NAME).symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="is a link, and a run keeps its lock there"):
        RunLock(tmp_path)
    assert os.listdir(tmp_path) == [lock.NAME]

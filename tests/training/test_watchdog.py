"""A run that hangs says who does not answer, and ends."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from llada import exits
from llada.training.watchdog import Watchdog, record_collectives
from tests import processes
from tests.stand_ins import like
from tests.workplace import Workplace


def wait_for(condition, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_silent_ranks_are_named_by_the_lowest_one_alive(tmp_path: Path) -> None:
    said: dict[int, list[str]] = {1: [], 2: []}
    (tmp_path / "rank_00000.json").write_text('{"host": "node7", "step": 17, "time": 1.0}')
    dogs = [Watchdog(tmp_path, rank, 4, 0.5, said[rank].append) for rank in (1, 2)]
    assert wait_for(lambda: all(said.values()))
    for dog in dogs:
        dog.on_end()
    assert said[2] == [""]
    [line] = said[1]
    assert line.startswith(
        "hang: no step finished for 0.5 s (run.hang_timeout): rank 0 on host node7 answered"
    )
    assert "last step 17; rank 3 never answered" in line


def test_progress_and_zero_keep_it_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of 0.3 s by a clock of the test's; at every one the watchdog looks at it."""
    clock = {"now": 0.0, "looks": 0}

    def monotonic() -> float:
        clock["looks"] += 1
        return clock["now"]

    monkeypatch.setattr("llada.training.watchdog.time", like(time, monotonic=monotonic))
    said: list[str] = []
    dog = Watchdog(tmp_path / "a", 0, 1, 0.4, said.append)
    for step in range(10):
        clock["now"] += 0.3
        looks = clock["looks"]
        assert wait_for(lambda before=looks: clock["looks"] > before, 60)
        dog.advance(step)
    dog.on_end()
    Watchdog(tmp_path / "b", 0, 1, 0, said.append).on_end()
    assert said == []
    assert not any(tmp_path.iterdir())


def test_when_all_answer_the_slowest_is_named(tmp_path: Path) -> None:
    said: list[str] = []
    dog = Watchdog(tmp_path, 0, 1, 0.3, said.append)
    dog.advance(5)
    assert wait_for(lambda: bool(said))
    dog.on_end()
    assert "every rank answers, none finishes a step; rank 0 on host" in said[0]
    assert said[0].endswith("last step 5")


def test_the_last_nccl_operations_are_kept_and_written_on_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for NCCL, which is not on every machine."""
    names = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "fr" / "rank_"),
    }
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    record_collectives(tmp_path / "fr")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    record_collectives(tmp_path / "fr")
    assert {name: os.environ[name] for name in names} == names
    assert not (tmp_path / "fr").exists(), "a run that is refused leaves nothing"
    (tmp_path / "fr").mkdir()
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(
        torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"operations", raising=False
    )
    said: list[str] = []
    dog = Watchdog(tmp_path / "beats", 3, 4, 0.3, said.append)
    assert wait_for(lambda: bool(said))
    dog.on_end()
    assert (tmp_path / "fr" / "rank_3").read_bytes() == b"operations"


def test_a_stopped_rank_ends_the_run_for_a_restart(workplace: Workplace) -> None:
    """SIGSTOP, as a frozen node: the other rank waits in a collective until the watchdog
    ends it.
    """
    run = {"dir": "frozen", "threads": 1, "hang_timeout": 6}
    config = workplace.config(
        "frozen.yaml", run=run, train={"steps": 500}, validation={"every": 1000, "windows": 8}
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **workplace.environment(),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    ranks = [
        processes.start(
            *("-m", "llada", "pretrain", config),
            cwd=workplace.folder,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=processes.DEVNULL,
        )
        for rank in range(2)
    ]
    metrics = workplace.folder / "frozen" / "metrics.jsonl"
    assert wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, 600)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        _, error = ranks[0].communicate(timeout=600)
    finally:
        ranks[1].kill()
        ranks[1].communicate()
    assert ranks[0].returncode == exits.RESTART
    last = error.strip().splitlines()[-1]
    assert last.startswith(
        "failed: hang: no step finished for 6 s (run.hang_timeout): rank 1 on host"
    )
    assert "run the same command again" in last

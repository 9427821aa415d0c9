"""Kills of a random rank at random moments: the run goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from llada.checkpoint.names import committed_checkpoints
from llada.checkpoint.verification import verify_checkpoint
from tests import processes
from tests.workplace import Workplace

RANKS = 4
KILLS = 10
"""Of each sequence; there are two, which may run beside each other."""
LAYOUT = {"tensor": 2, "sequence": True}


def start(workplace: Workplace, config: str) -> list[processes.Process]:
    """Every rank as a process of its own, as srun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **workplace.environment(),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return [
        processes.start(
            *("-m", "llada", "pretrain", config),
            cwd=workplace.folder,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=processes.DEVNULL,
            stderr=processes.DEVNULL,
        )
        for rank in range(RANKS)
    ]


def end(ranks: list[processes.Process], seconds: float) -> list[int]:
    """Exit codes; ranks that do not end in time are killed, as a launcher does, and count as -9."""
    deadline = time.monotonic() + seconds
    for process in ranks:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return [process.wait() for process in ranks]


def strays(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder."""
    command_lines = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # it has ended
            if link.readlink() == folder:
                command_lines.append(
                    f"{link.parent.name}: "
                    + (link.parent / "cmdline").read_text().replace("\0", " ")
                )
    return command_lines


def leftovers(folder: Path) -> list[str]:
    return [
        str(path)
        for pattern in ("*.partial", "*.tmp", "*.deleted")
        for path in folder.rglob(pattern)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 5])
def test_ten_kills_of_a_random_rank_at_random_moments(seed: int, workplace: Workplace) -> None:
    """During start-up, in steps and inside saves; every survivor ends too, and what is finished
    equals the uninterrupted run.
    """
    rng = random.Random(seed)
    settings = {
        "parallel": LAYOUT,
        "checkpoint": {"every": 2, "keep_last": 2},
        "batch": {"global": 8, "micro": 2},
        "train": {"steps": 24},
    }
    undisturbed = f"undisturbed-{seed}"
    disturbed = f"disturbed-{seed}"
    whole = workplace.config(
        f"{undisturbed}.yaml", run={"dir": undisturbed, "threads": 1}, **settings
    )
    began = time.monotonic()
    assert end(start(workplace, whole), 600) == [0] * RANKS
    duration = time.monotonic() - began
    wanted = workplace.lines(undisturbed)
    folder = workplace.folder / disturbed
    name = workplace.config(f"{disturbed}.yaml", run={"dir": disturbed, "threads": 1}, **settings)
    kills = finished = slow_survivors = 0
    while kills < KILLS:
        ranks = start(workplace, name)
        deadline = time.monotonic() + rng.uniform(0.1, duration)
        while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
            time.sleep(0.01)
        alive = [process for process in ranks if process.poll() is None]
        if alive:
            rng.choice(alive).send_signal(signal.SIGKILL)
            kills += 1
            codes = end(ranks, 45)
            slow_survivors += sum(code == -signal.SIGKILL for code in codes) - 1
        assert strays(workplace.folder) == []
        if not alive or kills == KILLS:
            assert end(start(workplace, name), 600) == [0] * RANKS
            assert workplace.lines(disturbed) == wanted
            assert leftovers(folder) == []
            checkpoints = committed_checkpoints(folder / "checkpoints")
            assert [verify_checkpoint(checkpoint) for checkpoint in checkpoints] == [[], []]
            shutil.rmtree(folder)
            finished += 1
    assert finished >= 1
    print(
        json.dumps(
            {
                "kills": kills,
                "finished": finished,
                "survivors killed by the launcher": slow_survivors,
            }
        )
    )

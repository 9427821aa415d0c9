"""Bad nodes among synthetic findings, and the node tests themselves on a pool of processes."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.job.bad_nodes import Verdict, judge
from launch.job.findings import FINDING_FILE, Finding, Rules
from launch.job.records import AttemptEnd, RankExit
from launch.preflight.main import RULES_VARIABLE
from tests import processes

RULES = Rules(
    seconds=30.0,
    join_seconds=60.0,
    gpus=2,
    min_gpu_memory_gb=70.0,
    min_disk_gb=10.0,
    max_clock_skew=5.0,
    slow_factor=1.5,
    matmul_size=64,
    allreduce_mb=0.1,
)
HOSTS = ["n0", "n1", "n2", "n3"]


def finding(host: str, rank: int, **values: Any) -> Finding:
    good: dict[str, Any] = {
        "disk_free_gb": 900.0,
        "gpus": 2,
        "gpu_memory_gb": 79.0,
        "matmul_seconds": 0.01,
        "connected": True,
        "joined": True,
        "clock": 1000.0,
        "local_gbps": 400.0,
        "network_gbps": 40.0,
    }
    return Finding(host, rank, **{**good, **values})


def verdict(
    folder: Path,
    end: AttemptEnd | None = None,
    hosts: list[str] = HOSTS,
    **bad: dict[str, Any] | None,
) -> Verdict:
    """Judge two ranks a host.

    `bad` gives what the second rank of a host measured otherwise; None: it left no finding.
    """
    for rank in range(2 * len(hosts)):
        host = hosts[rank // 2]
        other = bad.get(host, {}) if rank % 2 else {}
        if other is not None:
            (folder / FINDING_FILE.format(rank)).write_text(
                json.dumps(finding(host, rank, **other)._asdict())
            )
    count = 2 * len(hosts)
    return judge(
        folder,
        hosts,
        2,
        RULES,
        end or AttemptEnd([RankExit(r, "h", 0.0, 0, None) for r in range(count)], count, hosts),
    )


def reasons(outcome: Verdict) -> dict[str, str]:
    """Host -> why it is bad."""
    return {host: fault.why for host, fault in outcome.bad.items()}


def test_healthy_nodes_pass_with_their_figures(tmp_path: Path) -> None:
    outcome = verdict(tmp_path)
    assert reasons(outcome) == {}
    assert outcome.measured["n2"] == {
        "matmul_seconds": 0.01,
        "local_gbps": 400.0,
        "network_gbps": 40.0,
        "disk_free_gb": 900.0,
        "gpu_memory_gb": 79.0,
    }


@pytest.mark.parametrize(
    "values, why",
    [
        ({"gpus": 1}, "torch sees 1 GPUs, 2 are required"),
        (
            {"gpu_memory_gb": 3.0},
            "rank 3: 3.0 GB of GPU memory free, preflight.min_gpu_memory_gb is 70",
        ),
        (
            {"disk_error": "Read-only file system"},
            "the run folder cannot be written (Read-only file system)",
        ),
        ({"disk_free_gb": 0.5}, "0.5 GB free where the run writes, preflight.min_disk_gb is 10"),
        ({"clock": 1007.0}, "its clock is off by +3.5 s"),
        ({"clock": 980.0}, "its clock is off by -10.0 s, preflight.max_clock_skew is 5"),
        ({"matmul_seconds": 0.016}, "a matrix product takes 16 ms, 1.6 times the median"),
        (
            {"local_gbps": 200.0},
            "an all-reduce within the node runs at 200 GB/s, the median is 400",
        ),
        ({"network_gbps": 5.0}, "an all-reduce with other nodes runs at 5 GB/s, the median is 40"),
        (
            {"joined": False, "clock": None, "local_gbps": None, "network_gbps": None},
            "did not connect to the other ranks in 60 s",
        ),
        (
            {"connected": False, "joined": False, "clock": None},
            "did not reach the first node in 60 s",
        ),
        ({"matmul_seconds": None, "joined": False}, "rank 3 did not finish a matrix product"),
        (None, "1 of 2 ranks did not start"),
    ],
)
def test_a_bad_node_is_named_with_the_reason(
    tmp_path: Path, values: dict[str, Any] | None, why: str
) -> None:
    outcome = verdict(tmp_path, n1=values)
    # the median of its two ranks: within what is allowed
    if values is not None and values.get("clock") == 1007.0:
        assert reasons(outcome) == {}
    else:
        assert reasons(outcome) == {"n1": why} and f"n1 is bad: {why}" in outcome.lines


def test_slow_among_two_is_the_slower_one(tmp_path: Path) -> None:
    assert list(verdict(tmp_path, hosts=["n0", "n1"], n1={"matmul_seconds": 0.02}).bad) == ["n1"]


def test_a_test_that_died_blames_the_node_where_it_died_first(tmp_path: Path) -> None:
    end = AttemptEnd(
        [RankExit(5, "n2.example.org", 1.0, -7, None), RankExit(0, "n0", 2.0, 1, "failed: peer")],
        8,
        HOSTS,
    )
    assert reasons(verdict(tmp_path, end)) == {"n2": "rank 5 on n2.example.org: killed by SIGBUS"}


def test_slower_nodes_are_not_blamed_when_a_failure_elsewhere_ends_their_tests(
    tmp_path: Path,
) -> None:
    """One rank fails at once, and all others are ended with it.

    By then those of n2 have not started, and those of n3 are still at work.
    """
    failure = RankExit(1, "n0", 1.0, 1, "failed: CUDA error: uncorrectable ECC error")
    ended = [RankExit(rank, f"n{rank // 2}", 20.0, -9, None) for rank in (0, 2, 3, 6, 7)]
    waiting = {"matmul_seconds": None, "connected": False, "joined": False, "clock": None}
    end = AttemptEnd([failure, *ended], 8, HOSTS, absent=["n2"], killed=True)
    outcome = verdict(tmp_path, end, n1={"joined": False, "clock": None}, n2=None, n3=waiting)
    assert reasons(outcome) == {"n0": "rank 1 on n0: CUDA error: uncorrectable ECC error"}
    for code in (-9, -15):
        hung = AttemptEnd([replace(one, code=code) for one in ended], 8, HOSTS, killed=True)
        assert reasons(verdict(tmp_path, hung, n3=waiting)) == {
            "n3": "rank 7 did not finish a matrix product"
        }


def test_slower_nodes_are_not_blamed_when_the_ranks_of_another_cannot_start(
    tmp_path: Path,
) -> None:
    """Both ranks of n2 end before they can write that they started; nobody waits for the others.

    By then those of n3 have written nothing, since they were still importing torch.
    """
    killed = [RankExit(rank, f"n{rank // 2}", 20.0, -9, None) for rank in (0, 1, 2, 3, 6, 7)]
    line = "OSError: [Errno 30] Read-only file system"
    end = AttemptEnd(killed, 8, HOSTS, absent=["n2"], killed=True, launcher_line=line)
    outcome = verdict(tmp_path, end, n0={"joined": False}, n2=None, n3=None)
    assert reasons(outcome) == {"n2": f"1 of 2 ranks did not start ({line})"}


def test_where_all_fail_alike_nobody_is_blamed(tmp_path: Path) -> None:
    """A network interface that no node has is a mistake of the profile's."""
    end = AttemptEnd(
        [
            RankExit(rank, f"n{rank // 2}", float(rank), 1, "failed: no interface ib99")
            for rank in range(8)
        ],
        8,
        HOSTS,
    )
    outcome = verdict(tmp_path, end)
    assert (
        reasons(outcome) == {}
        and outcome.problem is not None
        and outcome.problem.reason == "rank 0 on n0: no interface ib99"
        and outcome.problem.reason in outcome.lines
    )
    assert outcome.problem.key == "preflight n0:exit 1 n1:exit 1 n2:exit 1 n3:exit 1"


def test_tests_that_were_only_too_slow_may_finish_the_next_time(tmp_path: Path) -> None:
    ended = [RankExit(rank, f"n{rank // 2}", 20.0, -9, None) for rank in range(8)]
    outcome = verdict(tmp_path, AttemptEnd(ended, 8, HOSTS, killed=True))
    assert outcome.problem is not None and outcome.problem.key is None


def test_a_fault_names_the_test_whatever_was_measured(tmp_path: Path) -> None:
    for free in (0.5, 0.6):
        outcome = verdict(tmp_path, n1={"disk_free_gb": free}, n2=None)
        tests = {host: fault.test for host, fault in outcome.bad.items()}
        assert tests == {"n1": "disk_free_gb", "n2": "started"}


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_the_tests_run_and_meet_in_every_ring(tmp_path: Path, hosts: int) -> None:
    """Processes that believe they are on several hosts, one or two a host, make the same groups."""
    local = 2 if hosts < 3 else 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(hosts * local),
        "LOCAL_WORLD_SIZE": str(local),
        RULES_VARIABLE: RULES.to_json(),
        "OMP_NUM_THREADS": "1",
    }
    command = ("-m", "launch.preflight.main", str(tmp_path), str(tmp_path))
    ranks = [
        processes.start(
            *command,
            cwd=processes.ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank % local)},
        )
        for rank in range(hosts * local)
    ]
    errors = [process.communicate(timeout=600)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * len(ranks), errors
    names = [f"n{host}" for host in range(hosts)]
    end = AttemptEnd(
        [RankExit(rank, "h", 0.0, 0, None) for rank in range(hosts * local)], hosts * local, names
    )
    lenient = replace(RULES, gpus=0, min_disk_gb=0.0, slow_factor=1e9)
    outcome = judge(tmp_path, names, local, lenient, end)
    assert reasons(outcome) == {}
    for figures in outcome.measured.values():
        assert (
            figures["matmul_seconds"] > 0
            and ("local_gbps" in figures) == (local > 1)
            and ("network_gbps" in figures) == (hosts > 1)
        )
    assert list(tmp_path.glob("*.disk")) == []

"""Cores: lists of them, NUMA nodes, and those near a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.job import affinity


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

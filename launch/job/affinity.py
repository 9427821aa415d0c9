"""Binds a rank to the cores next to its GPU (NUMA), or without GPUs to its share of the machine's
NUMA nodes.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_NODES = Path("/sys/devices/system/node")
_DEVICES = Path("/sys/bus/pci/devices")


def bind(local_rank: int, local_size: int) -> set[int]:
    """Narrow this process to the cores that are near; returns them. Where none is known, or Slurm
    bound it elsewhere, nothing changes.
    """
    near = cpus_near_gpu(local_rank) or cpus_of_numa_node(local_rank, local_size)
    allowed = os.sched_getaffinity(0)
    chosen = near & allowed
    if chosen and chosen != allowed:
        os.sched_setaffinity(0, chosen)
    return chosen or allowed


def cpus_near_gpu(local_rank: int, devices: Path = _DEVICES) -> set[int]:
    """Cores next to the GPU that a rank uses; empty when that cannot be told."""
    command = ["nvidia-smi", "--query-gpu=pci.bus_id", "--format=csv,noheader"]
    # Numbers or identifiers of the GPUs that the rank sees, in its own order.
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible:
        command += ["-i", visible[local_rank % len(visible)]]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return set()
    if not found:
        return set()
    # 00000000:1B:00.0 is 0000:1b:00.0 in /sys.
    bus = found[local_rank % len(found)].lower()[-12:]
    try:
        return parse_cpu_list((devices / bus / "local_cpulist").read_text())
    except (OSError, ValueError):
        return set()


def cpus_of_numa_node(local_rank: int, local_size: int, nodes: Path = _NODES) -> set[int]:
    """Cores of the NUMA node whose turn it is when the ranks are dealt out in order; empty on a
    machine with one.
    """
    try:
        lists = sorted(
            nodes.glob("node[0-9]*/cpulist"),
            key=lambda path: int(path.parent.name.removeprefix("node")),
        )
        groups = [cpus for path in lists if (cpus := parse_cpu_list(path.read_text()))]
    except (OSError, ValueError):
        return set()
    return groups[local_rank * len(groups) // local_size] if len(groups) > 1 else set()


def parse_cpu_list(text: str) -> set[int]:
    """{0, 1, 2, 8} of "0-2,8". Raises ValueError for anything else."""
    cpus: set[int] = set()
    for part in text.strip().split(",") if text.strip() else []:
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus

"""Binds a rank to the cores near its GPU, or without GPUs to the cores of a NUMA node."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_NUMA_NODES = Path("/sys/devices/system/node")
_PCI_DEVICES = Path("/sys/bus/pci/devices")


def bind(local_rank: int, local_size: int) -> set[int]:
    """Restrict this process to the cores near it, and return the cores it may then use.

    Nothing changes if these cores are unknown, or if Slurm bound the process to other cores.
    """
    near = cpus_near_gpu(local_rank) or cpus_of_numa_node(local_rank, local_size)
    allowed = os.sched_getaffinity(0)
    chosen = near & allowed
    if not chosen:
        return allowed
    if chosen != allowed:
        os.sched_setaffinity(0, chosen)
    return chosen


def cpus_near_gpu(local_rank: int, devices: Path = _PCI_DEVICES) -> set[int]:
    """Return the cores next to the GPU that a rank uses; empty if they are unknown."""
    command = ["nvidia-smi", "--query-gpu=pci.bus_id", "--format=csv,noheader"]
    # Indices or UUIDs of the GPUs that the rank sees, in the rank's own order.
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if visible:
        command += ["-i", visible[local_rank % len(visible)]]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return set()
    bus_ids = output.stdout.split()
    if not bus_ids:
        return set()
    # nvidia-smi prints 00000000:1B:00.0; /sys calls this device 0000:1b:00.0.
    device = bus_ids[local_rank % len(bus_ids)].lower()[-12:]
    try:
        return parse_cpu_list((devices / device / "local_cpulist").read_text())
    except (OSError, ValueError):
        return set()


def cpus_of_numa_node(local_rank: int, local_size: int, nodes: Path = _NUMA_NODES) -> set[int]:
    """Return the cores of the NUMA node that a rank belongs to; empty on a machine with only one.

    Ranks fill the NUMA nodes one after the other: of 4 ranks on 2 NUMA nodes, ranks 0 and 1 get the
    first.
    """
    try:
        paths = sorted(
            nodes.glob("node[0-9]*/cpulist"),
            # node10 comes after node9.
            key=lambda path: int(path.parent.name.removeprefix("node")),
        )
        cpus_of_nodes = [parse_cpu_list(path.read_text()) for path in paths]
    except (OSError, ValueError):
        return set()
    # A NUMA node may have memory and no cores.
    cpus_of_nodes = [cpus for cpus in cpus_of_nodes if cpus]
    if len(cpus_of_nodes) < 2:
        return set()
    return cpus_of_nodes[local_rank * len(cpus_of_nodes) // local_size]


def parse_cpu_list(text: str) -> set[int]:
    """Return {0, 1, 2, 8} for "0-2,8". Raises ValueError for anything else."""
    cpus: set[int] = set()
    if not text.strip():
        return cpus
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus

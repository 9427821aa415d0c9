"""The node tests, which every rank runs before the first step of a run.

They find out which GPUs and disk space a rank has, how fast it is, and whether it can communicate
with the others. Each result is written before the next test starts, so that missing results show in
which test a rank hung or died.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launch.job.findings import FINDING_FILE, Finding, Rules
from llada.files import write_json
from llada.process_rank import ProcessRank, launched_rank

RULES_VARIABLE = "LLADA_PREFLIGHT"
_REPEATS = 3


class _FindingFile:
    """The file with a rank's finding, which is written again whenever a value is added.

    Args:
        folder: folder of the findings.
        rank: rank that writes the file.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / FINDING_FILE.format(rank)
        self._values: dict[str, float | str | bool | None] = {
            **Finding(host=socket.gethostname(), rank=rank)._asdict()
        }
        self.add()

    def add(self, **values: float | str | bool | None) -> None:
        self._values |= values
        write_json(self._path, self._values)


def main() -> int:
    """Run `python -m launch.preflight.main FOLDER RUN` as one of the ranks.

    The environment variable LLADA_PREFLIGHT has the rules, as JSON.
    """
    folder = Path(sys.argv[1])
    run_folder = Path(sys.argv[2])
    rules = Rules.from_json(os.environ[RULES_VARIABLE])
    rank = launched_rank()
    device = torch.device("cpu")
    gpus = 0
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        device = torch.device("cuda", rank.local_rank % gpus)
        torch.cuda.set_device(device)
    finding = _FindingFile(folder, rank.rank)

    # Tests of this rank alone.
    finding.add(
        disk_free_gb=shutil.disk_usage(run_folder).free / 1e9,
        disk_error=_disk_error(folder, rank.rank),
    )
    gpu_memory_gb = None
    if gpus:
        gpu_memory_gb = torch.cuda.mem_get_info(device)[0] / 1e9
    finding.add(gpus=gpus, gpu_memory_gb=gpu_memory_gb)
    finding.add(matmul_seconds=_matmul_seconds(device, rules.matmul_size))

    # Connections to the other ranks.
    store = _connect(rank, rules)
    finding.add(connected=True)
    _join(rank, device, store, rules)
    finding.add(joined=True)
    # All ranks leave the barrier at nearly the same moment, so their clocks can be compared.
    dist.barrier()
    finding.add(clock=time.time())

    # Bandwidth.
    payload = torch.ones(int(rules.allreduce_mb * 1e6) // 4, device=device)
    local_group, neighbor_groups = _make_groups(rank.local_world_size)
    finding.add(local_gbps=_bandwidth(payload, local_group))
    speeds = []
    for group in neighbor_groups:
        speed = _bandwidth(payload, group)
        if speed is not None:
            speeds.append(speed)
    finding.add(network_gbps=max(speeds, default=None))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _connect(rank: ProcessRank, rules: Rules) -> dist.Store:
    """Connect to the store on the first node."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        rank.world_size,
        rank.rank == 0,
        timedelta(seconds=rules.join_seconds),
        wait_for_workers=False,
    )


def _join(rank: ProcessRank, device: torch.device, store: dist.Store, rules: Rules) -> None:
    """Wait until every rank has started, then connect to all of them.

    Starting may take long. Once all ranks have started, connecting must be quick.
    """
    store.set(f"here/{rank.rank}", "1")
    names = [f"here/{other}" for other in range(rank.world_size)]
    store.wait(names, timedelta(seconds=rules.join_seconds))
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=rules.seconds),
    )


def _disk_error(folder: Path, rank: int) -> str | None:
    """Write and read a file where the run writes its checkpoints; returns what went wrong."""
    path = folder / f"rank_{rank:05d}.disk"
    content = os.urandom(1 << 20)
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != content:
            return "what was read back differs"
        return None
    except OSError as error:
        return error.strerror
    finally:
        with suppress(OSError):
            path.unlink()


def _matmul_seconds(device: torch.device, size: int) -> float:
    """Time of a matrix product, seconds."""
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16
    # Random numbers, because products of ones draw less power and run faster.
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    return _best_seconds(lambda: torch.matmul(matrix, matrix), device)


Group = dist.ProcessGroup | None
"""None: this rank is in none of the groups of a round."""


def _make_groups(local_size: int) -> tuple[Group, list[Group]]:
    """Make the process groups of the all-reduces, on every rank in the same order.

    Each host is paired with both of its neighbors in a ring, in rounds in which no host is in two
    pairs. A slow link slows down both pairs of its host, while a healthy host has at least one fast
    pair. With hosts 0 to 3 the rounds are (0, 1) (2, 3) and (1, 2) (0, 3); with hosts 0 to 2 they
    are (0, 1) and (1, 2) and (0, 2).

    Returns:
        The group of this host's ranks, and for each round the group of this host and its neighbor.
    """
    ranks = dist.get_world_size()
    own_host = dist.get_rank() // local_size
    hosts = ranks // local_size
    members = []
    for host in range(hosts):
        members.append(list(range(host * local_size, (host + 1) * local_size)))

    single_hosts: list[tuple[int, ...]] = []
    if local_size > 1:
        single_hosts = [(host,) for host in range(hosts)]
    local_group = _make_round(single_hosts, members, own_host)
    rounds = [_make_round(pairs, members, own_host) for pairs in _ring_rounds(hosts) if pairs]
    return local_group, rounds


def _ring_rounds(hosts: int) -> list[list[tuple[int, ...]]]:
    """The pairs of neighboring hosts in a ring, in rounds."""
    if hosts < 2:
        return []
    even: list[tuple[int, ...]] = [(host, host + 1) for host in range(0, hosts - 1, 2)]
    odd: list[tuple[int, ...]] = [(host, host + 1) for host in range(1, hosts - 1, 2)]
    # The pair that closes the ring. With an odd number of hosts it needs a round of its own.
    closing: list[tuple[int, ...]] = []
    if hosts > 2:
        closing = [(0, hosts - 1)]
    if hosts % 2 == 0:
        return [even, odd + closing]
    return [even, odd, closing]


def _make_round(host_sets: list[tuple[int, ...]], members: list[list[int]], own_host: int) -> Group:
    """Make a group for each set of hosts; returns the group that contains this rank's host."""
    own_group = None
    for hosts in host_sets:
        ranks = [rank for host in hosts for rank in members[host]]
        group = dist.new_group(sorted(ranks))
        if own_host in hosts:
            own_group = group
    return own_group


def _bandwidth(payload: torch.Tensor, group: Group) -> float | None:
    """Bus bandwidth of an all-reduce, GB/s: bytes x 2 (n - 1) / n / seconds, as in nccl-tests."""
    # Rounds must not overlap, or they would share the links.
    dist.barrier()
    if group is None:
        return None
    size = dist.get_world_size(group)
    seconds = _best_seconds(lambda: dist.all_reduce(payload, group=group), payload.device)
    return payload.numel() * payload.element_size() * 2 * (size - 1) / size / seconds / 1e9


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Shortest time of several repetitions, seconds."""
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    # The first repetition also sets up connections and loads kernels.
    return min(times[1:])


if __name__ == "__main__":
    sys.exit(main())

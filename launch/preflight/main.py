"""Tests of the nodes before a run's first step, on every rank: what it sees, how fast it is, and
whether the others hear it.

Every finding is written down before the next test, so that a rank that hangs or dies in one is
known by what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.job.spec import write_record
from launch.preflight.rules import FINDINGS, Finding

_REPEATS = 3


def main() -> int:
    """`python -m launch.preflight.main FOLDER RUN`, as a rank of all; the rules are
    in LLADA_PREFLIGHT.
    """
    folder, state = Path(sys.argv[1]), Path(sys.argv[2])
    rules: dict[str, Any] = json.loads(os.environ["LLADA_PREFLIGHT"])
    rank, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    finding = Finding(host=socket.gethostname(), rank=rank)

    def keep(**values: Any) -> None:
        nonlocal finding
        finding = finding._replace(**values)
        write_record(folder / FINDINGS.format(rank), json.dumps(finding._asdict()))

    keep()
    keep(disk_free_gb=shutil.disk_usage(state).free / 1e9, disk_error=_disk_error(folder, rank))
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    keep(gpus=gpus, gpu_memory_gb=torch.cuda.mem_get_info(device)[0] / 1e9 if gpus else None)
    keep(matmul_seconds=_matmul_seconds(device, rules["matmul_size"]))
    store = _connect(rules["join_seconds"])
    keep(connected=True)
    _join(device, store, rules)
    keep(joined=True)
    dist.barrier()
    keep(clock=time.time())
    payload = torch.ones(int(rules["allreduce_mb"] * 1e6) // 4, device=device)
    local, pairs = _groups(local_size)
    keep(local_gbps=_bandwidth(payload, local))
    rounds = [_bandwidth(payload, group) for group in pairs]
    keep(network_gbps=max((value for value in rounds if value is not None), default=None))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _connect(seconds: float) -> dist.Store:
    """Reach the first node; who does not is known by that."""
    rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        port,
        size,
        rank == 0,
        timedelta(seconds=seconds),
        wait_for_workers=False,
    )


def _join(device: torch.device, store: dist.Store, rules: dict[str, Any]) -> None:
    """Meet the others: first by name, for which the slowest start counts, then by connections."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store.set(f"here/{rank}", "1")
    store.wait([f"here/{other}" for other in range(size)], timedelta(seconds=rules["join_seconds"]))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    group = dist.PrefixStore("group", store)
    dist.init_process_group(
        backend,
        store=group,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=rules["seconds"]),
    )


def _disk_error(folder: Path, rank: int) -> str | None:
    """Write and read a file where the run writes its checkpoints."""
    path = folder / f"rank_{rank:05d}.disk"
    content = os.urandom(1 << 20)
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return None if path.read_bytes() == content else "what was written reads otherwise"
    except OSError as error:
        return error.strerror
    finally:
        with suppress(OSError):
            path.unlink()


def _matmul_seconds(device: torch.device, size: int) -> float:
    """Best time of a matrix product, seconds."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # products of ones draw less power and run faster than real ones
    a = torch.randn(size, size, device=device, dtype=dtype)
    return _best(lambda: torch.matmul(a, a), device)


def _groups(local_size: int) -> tuple[dist.ProcessGroup | None, list[dist.ProcessGroup | None]]:
    """The ranks of this host, and this host with its neighbours of two rounds; None: there is no
    such group for this rank.

    A slow link shows in both pairs of its host; of a healthy host at least one pair is fast.
    """
    ranks, own = dist.get_world_size(), dist.get_rank() // local_size
    hosts = ranks // local_size
    members = [list(range(host * local_size, (host + 1) * local_size)) for host in range(hosts)]
    local = _mine([(host,) for host in range(hosts)] if local_size > 1 else [], members, own)
    if hosts < 2:
        return local, []
    even = [(host, host + 1) for host in range(0, hosts - 1, 2)]
    odd = [(host, host + 1) for host in range(1, hosts - 1, 2)]
    # the ring: with an odd number it takes a round of its own
    closing = [(0, hosts - 1)] if hosts > 2 else []
    rounds = [even, odd + closing] if hosts % 2 == 0 else [even, odd, closing]
    return local, [_mine(pairs, members, own) for pairs in rounds if pairs]


def _mine(
    pairs: Sequence[tuple[int, ...]], members: list[list[int]], own: int
) -> dist.ProcessGroup | None:
    """Make a group of each pair of hosts, on every rank in the same order; the one with the own
    host.
    """
    mine = None
    for pair in pairs:
        group = dist.new_group(sorted(rank for host in pair for rank in members[host]))
        if own in pair:
            mine = group
    return mine


def _bandwidth(payload: torch.Tensor, group: dist.ProcessGroup | None) -> float | None:
    """Bus bandwidth of an all-reduce, GB/s: bytes x 2 (n - 1) / n / seconds, as in nccl-tests."""
    dist.barrier()  # one round after the other
    if group is None:
        return None
    size = dist.get_world_size(group)
    seconds = _best(lambda: dist.all_reduce(payload, group=group), payload.device)
    return payload.numel() * payload.element_size() * 2 * (size - 1) / size / seconds / 1e9


def _best(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):  # the first one also makes connections and loads kernels
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


if __name__ == "__main__":
    sys.exit(main())

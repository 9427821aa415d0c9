"""What the node tests measure. Standard library only.

Every rank writes a finding (`launch.preflight.main`), and `launch.job.bad_nodes` judges them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

FINDING_FILE = "rank_{:05d}.finding.json"


@dataclass(frozen=True)
class Rules:
    """What the nodes are tested for; see `launch.profile.Preflight` for the settings.

    Attributes:
        join_seconds: time limit for every rank to start and reach the first node.
        seconds: time limit for the ranks to connect, and for each all-reduce.
        gpus: minimum number of GPUs that torch sees on a node.
        min_gpu_memory_gb: minimum free memory per GPU, GB.
        min_disk_gb: minimum free space on the file system of the run folder, GB.
        max_clock_skew: maximum difference between a node's clock and the median, seconds.
        slow_factor: maximum ratio of a node's time to the median time.
        matmul_size: number of rows and columns of the matrices.
        allreduce_mb: size of the all-reduce, MB.
    """

    join_seconds: float
    seconds: float
    gpus: int
    min_gpu_memory_gb: float
    min_disk_gb: float
    max_clock_skew: float
    slow_factor: float
    matmul_size: int
    allreduce_mb: float

    @classmethod
    def of_settings(cls, settings: dict[str, float], join_seconds: float) -> Rules:
        """Make the rules from the settings in a job's description."""
        return cls(
            join_seconds=join_seconds,
            seconds=settings["seconds"],
            gpus=int(settings["gpus"]),
            min_gpu_memory_gb=settings["min_gpu_memory_gb"],
            min_disk_gb=settings["min_disk_gb"],
            max_clock_skew=settings["max_clock_skew"],
            slow_factor=settings["slow_factor"],
            matmul_size=int(settings["matmul_size"]),
            allreduce_mb=settings["allreduce_mb"],
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Rules:
        return cls(**json.loads(text))


class Finding(NamedTuple):
    """What one rank measured. A number is None if the test did not finish.

    Attributes:
        host: host of the rank.
        rank: number of the rank.
        disk_free_gb: free space on the file system of the run folder, GB.
        disk_error: why a file could not be written and read there; None: no error.
        gpus: number of GPUs that torch sees.
        gpu_memory_gb: free memory of this rank's GPU, GB; None without a GPU.
        matmul_seconds: time of a matrix product, seconds.
        connected: whether the rank reached the first node.
        joined: whether the rank connected to all other ranks.
        clock: this host's clock, seconds since 1970; all ranks read it within milliseconds.
        local_gbps: bus bandwidth of an all-reduce within the host, GB/s.
        network_gbps: bus bandwidth of an all-reduce with the faster neighboring host, GB/s.
    """

    host: str
    rank: int
    disk_free_gb: float | None = None
    disk_error: str | None = None
    gpus: int | None = None
    gpu_memory_gb: float | None = None
    matmul_seconds: float | None = None
    connected: bool = False
    joined: bool = False
    clock: float | None = None
    local_gbps: float | None = None
    network_gbps: float | None = None

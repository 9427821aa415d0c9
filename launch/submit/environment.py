"""What NCCL, gloo and CUDA are told, in one place. A profile's environment.variables replace any of
it.
"""

from __future__ import annotations

from launch.profile import ClusterProfile
from llada.config import RunConfig


def rank_environment(profile: ClusterProfile | None, config: RunConfig | None) -> dict[str, str]:
    """Variables of every rank.

    Args:
        profile: of the cluster; None: this machine.
        config: of the run; None: a job without ranks.
    """
    found = {
        # A collective that fails or never ends must end the process, not leave it waiting: the job
        # then starts again.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        # Its reasons for an error, in the log of the rank that had it.
        "NCCL_DEBUG": "WARN",
    }
    if config is not None and (config.parallel.tensor > 1 or config.parallel.context > 1):
        # One hardware queue: kernels start in the order they were launched, which lets
        # communication overlap with what follows.
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if profile is not None:
        if profile.network_interface is not None:
            # Connections are made over these; the traffic of InfiniBand itself does not depend on
            # them.
            found["NCCL_SOCKET_IFNAME"] = found["GLOO_SOCKET_IFNAME"] = profile.network_interface
        found |= {name: str(value) for name, value in profile.environment.variables.items()}
    return found

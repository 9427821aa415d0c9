"""Environment variables that configure NCCL, gloo and CUDA, in one place.

A profile's environment.variables replace any of them.
"""

from __future__ import annotations

from launch.profile import ClusterProfile
from llada.config import RunConfig


def rank_environment(profile: ClusterProfile | None, config: RunConfig | None) -> dict[str, str]:
    """Return the environment variables of every rank.

    Args:
        profile: of the cluster; None: this machine.
        config: of the run; None: a job without ranks.
    """
    variables = {
        # A collective that fails or never ends must end the process instead of leaving it waiting:
        # the job then starts again.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        # NCCL prints its reasons for an error, into the log of the rank that had it.
        "NCCL_DEBUG": "WARN",
    }
    if config is not None and (config.parallel.tensor > 1 or config.parallel.context > 1):
        # One hardware queue: kernels start in the order they were launched, which lets
        # communication overlap with what follows.
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if profile is None:
        return variables
    if profile.network_interface is not None:
        # For making connections; the traffic of InfiniBand itself does not depend on them.
        variables["NCCL_SOCKET_IFNAME"] = profile.network_interface
        variables["GLOO_SOCKET_IFNAME"] = profile.network_interface
    for name, value in profile.environment.variables.items():
        variables[name] = str(value)
    return variables

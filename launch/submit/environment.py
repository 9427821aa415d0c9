"""All environment variables that configure NCCL, gloo and CUDA.

The profile's environment.variables override any of them.
"""

from __future__ import annotations

from launch.profile import ClusterProfile
from llada.config import RunConfig


def rank_environment(profile: ClusterProfile | None, config: RunConfig | None) -> dict[str, str]:
    """Return the environment variables of every rank.

    Args:
        profile: profile of the cluster; None: this machine.
        config: config of the run; None: a job that does not train.
    """
    variables = {
        # A collective that fails or hangs ends the process, so that the job can restart.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        # NCCL prints the reason of an error, to the log of the rank.
        "NCCL_DEBUG": "WARN",
    }
    if config is not None and (config.parallel.tensor > 1 or config.parallel.context > 1):
        # With one hardware queue, kernels start in the order in which they were launched, so that
        # communication overlaps with the kernels that follow it.
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if profile is None:
        return variables
    if profile.network_interface is not None:
        # Only for setting up connections: InfiniBand traffic does not use these interfaces.
        variables["NCCL_SOCKET_IFNAME"] = profile.network_interface
        variables["GLOO_SOCKET_IFNAME"] = profile.network_interface
    for name, value in profile.environment.variables.items():
        variables[name] = str(value)
    return variables

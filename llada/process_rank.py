"""The rank of this process among all processes, as torchrun or Slurm set it.

Standard library only: the launcher, which does not import torch, reads it too.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from llada.errors import UserError

LOCAL_LAUNCH_VARIABLE = "LLADA_LOCAL"
"""Set by the launcher where it starts ranks without srun, perhaps within a Slurm job."""


class ProcessRank(NamedTuple):
    """This process among all processes.

    Attributes:
        rank: number of the process.
        world_size: number of processes.
        local_rank: number of the process on its machine.
        local_world_size: number of processes on its machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def variables(self) -> dict[str, str]:
        """Return the environment variables that torchrun would set."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
        }


ALONE = ProcessRank(rank=0, world_size=1, local_rank=0, local_world_size=1)
"""A process that is not one of several."""


def world_from_environment() -> ProcessRank:
    """Read the rank that torchrun or srun set; `ALONE` if this process was started alone.

    Raises:
        UserError: Variables are missing or contradict each other, or srun started several tasks
            that cannot find each other.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" not in env:
        raise UserError(
            f"environment: RANK={env['RANK']} is set and WORLD_SIZE is not; set both, as torchrun"
            " does, or neither to train alone"
        )
    if "WORLD_SIZE" in env:
        rank = _read_torchrun()
        _check_meeting_point("WORLD_SIZE", rank)
        return rank
    if "MASTER_ADDR" in env:
        rank = _read_slurm()
        _check_meeting_point("SLURM_NTASKS", rank)
        return rank
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise UserError(
            f"environment: srun started {tasks} tasks, but MASTER_ADDR (the first node's name) and"
            " MASTER_PORT (a free port) are not set; export both before srun, or every task would"
            " train alone"
        )
    return ALONE


def launched_rank() -> ProcessRank:
    """Read the rank of a process that the launcher started: from srun in a job step, else torchrun.

    Slurm's variables come first: torchrun's may be left over from the shell that submitted the job.

    Raises:
        UserError: Variables are missing or contradict each other.
    """
    if "SLURM_STEP_ID" in os.environ and LOCAL_LAUNCH_VARIABLE not in os.environ:
        return _read_slurm()
    return _read_torchrun()


def _read_torchrun() -> ProcessRank:
    return _read(("RANK", "WORLD_SIZE", "LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE"))


def _read_slurm() -> ProcessRank:
    return _read(("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), None)


def _read(names: tuple[str, str, str], local_size: str | None) -> ProcessRank:
    """Read the variables of these names: rank, world size, local rank.

    Args:
        names: of the variables.
        local_size: number of processes on this machine; None: an equal share for each node of
            Slurm's job step, or all processes if there is no step.
    """
    env = os.environ
    rank_name, size_name, local_name = names
    try:
        rank = int(env[rank_name])
        size = int(env[size_name])
        local_rank = int(env.get(local_name, rank))
        if local_size is None:
            nodes = int(env.get("SLURM_STEP_NUM_NODES", "1"))
            local_world_size = max(1, size // nodes)
        else:
            local_world_size = int(local_size)
    except (KeyError, ValueError) as error:
        reason = str(error)
        if isinstance(error, KeyError):
            reason = f"{error.args[0]} is not set"
        raise UserError(
            f"environment: {'/'.join(names)} must be integers, set by torchrun or srun; {reason}"
        ) from None
    if not 0 <= rank < size:
        raise UserError(
            f"environment: {rank_name}={rank} is outside the world of {size_name}={size}"
        )
    return ProcessRank(rank, size, local_rank, local_world_size)


def _check_meeting_point(size_name: str, rank: ProcessRank) -> None:
    """Raise UserError if several processes do not know where to meet."""
    if rank.world_size == 1:
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"environment: {size_name}={rank.world_size}, but {name} is not set; torchrun sets"
                " it, for srun export it first"
            )

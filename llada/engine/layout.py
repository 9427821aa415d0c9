"""Which process does what: process groups, the place of this rank, and its part of a batch."""

from __future__ import annotations

import gc
import math
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llada.config.sections import ParallelSection
from llada.device import VARIABLE, gpu_available
from llada.engine.base import ParallelRank
from llada.errors import UserError

_DEFAULT_TIMEOUT_S = 1800.0
"""Seconds that a collective may take where no hang timeout is set."""


def world_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as set by torchrun or srun; (0, 1, 0) when started alone.

    Raises UserError when variables are missing or contradict each other, or when srun started
    several tasks that cannot find each other.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" not in env:
        raise UserError(
            f"environment: RANK={env['RANK']} is set and WORLD_SIZE is not; set both, as torchrun"
            " does, or neither to train alone"
        )
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in env and "MASTER_ADDR" not in env and tasks != "1":
        raise UserError(
            f"environment: srun started {tasks} tasks, but MASTER_ADDR (the first node's name) and"
            " MASTER_PORT (a free port) are not set; export both before srun, or every task would"
            " train alone"
        )
    names = (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if "WORLD_SIZE" in env
        else ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    )
    if "WORLD_SIZE" not in env and "MASTER_ADDR" not in env:
        return 0, 1, 0
    try:
        rank, size = int(env[names[0]]), int(env[names[1]])
        local = int(env.get(names[2], rank))
    except (KeyError, ValueError) as error:
        what = f"{error.args[0]} is not set" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"environment: {'/'.join(names)} must be integers, set by torchrun or srun; {what}"
        ) from None
    if not 0 <= rank < size:
        raise UserError(f"environment: {names[0]}={rank} is outside the world of {names[1]}={size}")
    for name in ("MASTER_ADDR", "MASTER_PORT") if size > 1 else ():
        if not env.get(name):
            raise UserError(
                f"environment: {names[1]}={size}, but {name} is not set; torchrun sets it, for srun"
                " export it first"
            )
    return rank, size, local


def start_process_group(
    rank: int, size: int, device: torch.device, timeout_s: float = _DEFAULT_TIMEOUT_S
) -> None:
    """Join the world: NCCL on GPU (with gloo beside it for CPU tensors), gloo on CPU. Alone, no
    network is touched.
    """
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore() if size == 1 else None
    init_method = None if size == 1 else "env://"
    if size > 1:
        os.environ.setdefault("RANK", str(rank))
        os.environ.setdefault("WORLD_SIZE", str(size))
    dist.init_process_group(
        backend,
        init_method=init_method,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )


def join_world(hang_timeout_s: float = 0) -> torch.device:
    """Join the world that the environment describes, if this process has not; returns its device
    (the GPU is selected).

    Args:
        hang_timeout_s: after which the run's watchdog reports a hang, seconds; 0: never. A
            collective waits twice as long, so that the report, which names the ranks that hang,
            comes before NCCL ends the process.

    Raises:
        UserError: ranks of one machine would share a GPU.
    """
    if not dist.is_initialized():
        rank, size, local = world_from_environment()
        gpu = gpu_available()
        if gpu:
            # One hardware queue: kernels start in the order they were launched, so communication
            # overlaps with what follows.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
            torch.cuda.set_device(_own_gpu(local, torch.cuda.device_count()))
        start_process_group(rank, size, _device(), 2 * hang_timeout_s or _DEFAULT_TIMEOUT_S)
        if gpu and size > 1:
            _refuse_shared_gpus()
    return _device()


def _own_gpu(local_rank: int, visible: int) -> int:
    """The GPU of this rank: the one that it is alone to see, or the one with its local rank."""
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(
            f"environment: local rank {local_rank} has no GPU of its own, this machine shows"
            f" {visible}; start at most {visible} ranks on a machine, or compute on the CPU with"
            f" {VARIABLE}=cpu"
        )
    return local_rank


def _refuse_shared_gpus() -> None:
    """NCCL would end with an internal error, or training would be many times too slow."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    own = f"{socket.gethostname()} {properties.uuid}"
    every: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(every, own)
    sharing = [rank for rank, other in enumerate(every) if other == own]
    if len(sharing) > 1:
        raise UserError(
            f"environment: ranks {', '.join(map(str, sharing))} would share one GPU"
            f" ({properties.name}); start one rank for each GPU, or compute on the CPU with"
            f" {VARIABLE}=cpu"
        )


def _device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if gpu_available()
        else torch.device("cpu")
    )


def gather_world(value: Any) -> list[Any]:
    """A small picklable value of every process, on every process; joins the world first."""
    join_world()
    values: list[Any] = [None] * dist.get_world_size()
    if len(values) == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


def start_model_parallel(parallel: ParallelSection, hang_timeout_s: float = 0) -> ParallelRank:
    """Create Megatron-Core's process groups and return this rank's place. Its collectives wait as
    long as the world's.
    """
    from megatron.core import parallel_state as state
    from megatron.core import tensor_parallel

    # An engine that was closed before may live on in reference cycles, and with it the threads of
    # its groups.
    gc.collect()
    state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=math.ceil((2 * hang_timeout_s or _DEFAULT_TIMEOUT_S) / 60),
    )
    # unused by us (weights are keyed, dropout is 0); Megatron-Core wants it set
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    return ParallelRank(
        dist.get_rank(),
        dist.get_world_size(),
        state.get_data_parallel_rank(),
        state.get_data_parallel_world_size(),
    )


def stop_model_parallel() -> None:
    """Destroy every group except the world's, so that another layout can be built in this process.

    Groups that merely fall out of scope would leak their threads and file descriptors.
    """
    from megatron.core import parallel_state as state
    from torch.distributed import distributed_c10d as c10d

    world = dist.group.WORLD
    state.destroy_model_parallel()
    for group in list(c10d._world.pg_map):
        if group is not world:
            dist.destroy_process_group(group)


def sample_offsets(
    global_batch: int, micro_batch: int, data_rank: int, data_size: int
) -> list[range]:
    """Which samples of a step form this replica's micro-batches, as offsets 0..global-1:
    round-robin over the replicas.
    """
    count = global_batch // (micro_batch * data_size)
    firsts = ((i * data_size + data_rank) * micro_batch for i in range(count))
    return [range(first, first + micro_batch) for first in firsts]

"""Which process does what: the world, process groups, and the samples of each replica."""

from __future__ import annotations

import gc
import math
import os
import socket
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from llada.config.sections import ParallelSection
from llada.device import VARIABLE, gpu_available
from llada.engine.base import ParallelRank
from llada.errors import UserError
from llada.process_rank import world_from_environment

T = TypeVar("T")

_DEFAULT_TIMEOUT_S = 1800.0
"""Seconds that a collective may take if no hang timeout is set."""


def start_process_group(
    rank: int, size: int, device: torch.device, timeout_s: float = _DEFAULT_TIMEOUT_S
) -> None:
    """Join the world, unless this process has.

    The backend is gloo on CPU, and on a GPU NCCL with gloo beside it for CPU tensors. A world of
    one process does not use the network.
    """
    if dist.is_initialized():
        return
    store = None
    init_method = None
    if size == 1:
        store = dist.HashStore()
    else:
        init_method = "env://"
        os.environ.setdefault("RANK", str(rank))
        os.environ.setdefault("WORLD_SIZE", str(size))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=init_method,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )


def join_world(hang_timeout_s: float = 0) -> torch.device:
    """Join the world that the environment describes, unless this process has.

    On a GPU machine this selects the process's GPU.

    Args:
        hang_timeout_s: Seconds after which the run's watchdog reports a hang; 0: never. A
            collective waits twice as long, so that the report, which names the ranks that hang,
            comes before NCCL ends the process.

    Returns:
        The device of this process.

    Raises:
        UserError: Ranks of one machine would share a GPU.
    """
    if not dist.is_initialized():
        process = world_from_environment()
        on_gpu = gpu_available()
        if on_gpu:
            # With one hardware queue kernels start in the order in which they were launched, so
            # communication overlaps with the kernels that follow it.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
            torch.cuda.set_device(_own_gpu(process.local_rank, torch.cuda.device_count()))
        timeout_s = 2 * hang_timeout_s or _DEFAULT_TIMEOUT_S
        start_process_group(process.rank, process.world_size, _device(), timeout_s)
        if on_gpu and process.world_size > 1:
            _refuse_shared_gpus()
    return _device()


def _own_gpu(local_rank: int, visible: int) -> int:
    """The GPU of this rank: the only visible one, or the one with its local rank."""
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
    """Raise UserError if this rank's GPU is another rank's too; collective.

    NCCL would end with an internal error, or training would be many times too slow.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    own = f"{socket.gethostname()} {properties.uuid}"
    all_gpus: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(all_gpus, own)
    sharing = [rank for rank, gpu in enumerate(all_gpus) if gpu == own]
    if len(sharing) > 1:
        raise UserError(
            f"environment: ranks {', '.join(map(str, sharing))} would share one GPU"
            f" ({properties.name}); start one rank for each GPU, or compute on the CPU with"
            f" {VARIABLE}=cpu"
        )


def _device() -> torch.device:
    if gpu_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gather_world(value: T) -> list[T]:
    """The values of all processes, on every process; small and picklable. Joins the world first."""
    join_world()
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def start_model_parallel(parallel: ParallelSection, hang_timeout_s: float = 0) -> ParallelRank:
    """Create Megatron-Core's process groups and return this rank.

    Their collectives wait as long as the world's; see `join_world`.
    """
    from megatron.core import parallel_state as state
    from megatron.core import tensor_parallel

    # An engine that was closed may live on in reference cycles, and with it the threads of its
    # process groups.
    gc.collect()
    state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=math.ceil((2 * hang_timeout_s or _DEFAULT_TIMEOUT_S) / 60),
    )
    # Megatron-Core requires a seed. Nothing draws from it: weights are keyed and dropout is 0.
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    return ParallelRank(
        dist.get_rank(),
        dist.get_world_size(),
        state.get_data_parallel_rank(),
        state.get_data_parallel_world_size(),
    )


def stop_model_parallel() -> None:
    """Destroy every group except the world's, so that this process can build another layout.

    Groups that merely go out of scope would leak their threads and file descriptors.
    """
    from megatron.core import parallel_state as state
    from torch.distributed import distributed_c10d as c10d

    world = dist.group.WORLD
    state.destroy_model_parallel()
    # A copy: destroying a group removes it from the map.
    for group in list(c10d._world.pg_map):
        if group is not world:
            dist.destroy_process_group(group)


def sample_offsets(
    global_batch: int, micro_batch: int, data_rank: int, data_size: int
) -> list[range]:
    """Which samples of a step form this replica's micro-batches, as offsets 0..global-1.

    Micro-batches are dealt to the replicas in turn, so which samples share a micro-batch does not
    depend on the number of replicas.

    >>> sample_offsets(global_batch=8, micro_batch=2, data_rank=1, data_size=2)
    [range(2, 4), range(6, 8)]
    """
    count = global_batch // (micro_batch * data_size)
    firsts = [(i * data_size + data_rank) * micro_batch for i in range(count)]
    return [range(first, first + micro_batch) for first in firsts]

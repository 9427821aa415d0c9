"""The distributed optimizer's state as pieces of the model's tensors: every rank writes and reads
what it owns, on any layout.

A replica owns a flat range of every parameter's elements; cut at row ends, that is at most three
rectangles of the matrix, and rectangles are what a distributed checkpoint can reshard.
Megatron-Core's own format for this gathers the whole state in the host memory of every rank before
a save: for 8B parameters 96 GB a rank, and training waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

MASTERS = ("param",)
WEIGHTS = ("weight",)
"""The masters again, read from the weights of a checkpoint that holds no masters."""
EVERYTHING = ("param", "exp_avg", "exp_avg_sq")


def start_moments(parts: Sequence[Any]) -> None:
    """Give every parameter the state that AdamW would make in its first step, zero moments and zero
    steps, in place of any other.

    Args:
        parts: Megatron-Core's DistributedOptimizers.
    """
    for part in parts:
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                step = torch.zeros((), dtype=torch.float32, device=master.device)
                part.optimizer.state[master] = {"step": step} | {
                    name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")
                }


def step_count(parts: Sequence[Any]) -> int:
    """Updates done, the same for all parameters."""
    return max(
        (int(moments["step"]) for part in parts for moments in part.optimizer.state.values()),
        default=0,
    )


def set_step_count(parts: Sequence[Any], count: int) -> None:
    """Set the updates done, a tensor of its own for each parameter: a shared one would grow once
    per parameter and step.
    """
    for part in parts:
        for master, moments in part.optimizer.state.items():
            moments["step"] = torch.full(
                (), float(count), dtype=torch.float32, device=master.device
            )


def pieces(
    parts: Sequence[Any], model: dict[str, Any], kinds: Sequence[str]
) -> list[ShardedTensor]:
    """This rank's part of masters and moments, as views: saving reads them, loading writes them.

    Args:
        parts: Megatron-Core's DistributedOptimizers, with moments.
        model: the model's sharded state, which says where each parameter lies in the whole model.
        kinds: which of EVERYTHING, or WEIGHTS.
    """
    homes = {
        value.data: value
        for value in nested_values(model)
        if isinstance(value, (ShardedTensor, ShardedTensorFactory))
    }
    found: list[ShardedTensor] = []
    for part in parts:
        for parameter in part.model_param_group_index_map:
            home = homes[parameter]
            blocks = (
                list(nested_values(home.build()))
                if isinstance(home, ShardedTensorFactory)
                else [home]
            )
            span = part._get_model_param_range_map(parameter)["param"]
            state = part._get_main_param_and_optimizer_states(parameter)
            for kind in kinds:
                prefix = "" if kind in WEIGHTS else f"optimizer.state.{kind}."
                found += _cut(
                    prefix, state["param" if kind in WEIGHTS else kind].detach(), span.start, blocks
                )
    return found


def _cut(
    prefix: str, flat: torch.Tensor, first: int, blocks: list[ShardedTensor]
) -> Iterator[ShardedTensor]:
    """Rectangles of a flat range of a parameter's elements that begins at element `first`.

    The parameter is `blocks` one below the other, each a rectangle of a stored tensor (gate and up
    of the SwiGLU are two).
    """
    base = 0
    for block in blocks:
        size = block.data.numel()
        start, stop = max(first, base), min(first + flat.numel(), base + size)
        for low, high, shape, corner in _rectangles(
            start - base, stop - base, tuple(block.local_shape)
        ):
            lead = len(block.global_shape) - len(shape)
            data = flat[base + low - first : base + high - first].view((1,) * lead + shape)
            offset = [
                *block.global_offset[:lead],
                *(a + b for a, b in zip(block.global_offset[lead:], corner, strict=True)),
            ]
            yield ShardedTensor(
                key=prefix + block.key,
                data=data,
                dtype=data.dtype,
                local_shape=tuple(data.shape),
                global_shape=tuple(block.global_shape),
                global_offset=tuple(offset),
                axis_fragmentations=None,  # rectangles of any size
                replica_id=(
                    *block.replica_id[:2],
                    0,
                ),  # the last counts replicas; here each owns something else
            )
        base += size


def _rectangles(
    start: int, stop: int, shape: tuple[int, ...]
) -> Iterator[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """(start, stop, shape, first index) of the rectangles that a flat range of a tensor with one or
    two axes consists of.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield start, stop, (stop - start,), (start,)
        return
    width = shape[1]
    body, tail = min(stop, -(-start // width) * width), max(start, stop // width * width)
    if start < body:
        yield start, body, (1, body - start), (start // width, start % width)
    if body < tail:
        yield body, tail, ((tail - body) // width, width), (body // width, 0)
    if max(body, tail) < stop:
        yield tail, stop, (1, stop - tail), (tail // width, 0)

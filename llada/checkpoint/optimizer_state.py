"""The distributed optimizer's state as rectangles of the model's tensors.

Every rank writes and reads the part that it owns, and the part may be another one on another
layout. Megatron-Core's own format for this gathers the whole state in the host memory of every rank
before a save: for 8B parameters 96 GB per rank, and training waits for it.

Megatron's distributed optimizer gives each replica a flat range of every parameter's elements. A
distributed checkpoint can reshard rectangles, so the range is cut at row ends, into at most three.
For a matrix of 4 rows and 5 columns, a replica that owns elements 3 to 16 (17 exclusive) has

    row 0    .  .  .  3  4        (1, 2) at (0, 3)     head: the rest of a row
    row 1    5  6  7  8  9        (2, 5) at (1, 0)     body: whole rows
    row 2   10 11 12 13 14
    row 3   15 16  .  .  .        (1, 2) at (3, 0)     tail: the start of a row
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from llada.arithmetic import ceil_div

if TYPE_CHECKING:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

MASTER_STATES = ("param",)
WEIGHT_STATES = ("weight",)
"""The masters again, read from the weights of a checkpoint that contains no masters."""
ALL_STATES = ("param", "exp_avg", "exp_avg_sq")


def start_moments(optimizers: Sequence[DistributedOptimizer]) -> None:
    """Give every parameter the state that AdamW would create in its first step.

    That is zero moments and zero steps. Any other state is replaced.
    """
    for optimizer in optimizers:
        for group in optimizer.optimizer.param_groups:
            for master in group["params"]:
                optimizer.optimizer.state[master] = {
                    "step": torch.zeros((), dtype=torch.float32, device=master.device),
                    "exp_avg": torch.zeros_like(master),
                    "exp_avg_sq": torch.zeros_like(master),
                }


def step_count(optimizers: Sequence[DistributedOptimizer]) -> int:
    """Return the number of updates done, which is the same for all parameters."""
    counts = [
        int(state["step"])
        for optimizer in optimizers
        for state in optimizer.optimizer.state.values()
    ]
    return max(counts, default=0)


def set_step_count(optimizers: Sequence[DistributedOptimizer], count: int) -> None:
    """Set the number of updates done.

    Each parameter gets a tensor of its own: AdamW counts in place, so a shared one would grow once
    for each parameter in every step.
    """
    for optimizer in optimizers:
        for master, state in optimizer.optimizer.state.items():
            state["step"] = torch.full((), float(count), dtype=torch.float32, device=master.device)


def owned_rectangles(
    optimizers: Sequence[DistributedOptimizer],
    model: Mapping[str, object],
    names: Sequence[str],
) -> list[ShardedTensor]:
    """Return this rank's part of masters and moments, as views.

    A save reads the views, a load writes into them.

    Args:
        optimizers: with moments.
        model: the model's sharded state, which says where each parameter lies in the whole model.
        names: which of ALL_STATES, or WEIGHT_STATES.
    """
    sharded_parameters = {
        value.data: value
        for value in nested_values(model)
        if isinstance(value, (ShardedTensor, ShardedTensorFactory))
    }
    rectangles: list[ShardedTensor] = []
    for optimizer in optimizers:
        for parameter in optimizer.model_param_group_index_map:
            sharded = sharded_parameters[parameter]
            blocks = [sharded]
            if isinstance(sharded, ShardedTensorFactory):
                # The SwiGLU's fc1: gate and up are stored as two tensors.
                blocks = list(nested_values(sharded.build()))
            owned = optimizer._get_model_param_range_map(parameter)["param"]
            state = optimizer._get_main_param_and_optimizer_states(parameter)
            for name in names:
                if name in WEIGHT_STATES:
                    prefix = ""
                    values = state["param"]
                else:
                    prefix = f"optimizer.state.{name}."
                    values = state[name]
                rectangles += _cut(prefix, values.detach(), owned.start, blocks)
    return rectangles


def _cut(
    prefix: str, flat: torch.Tensor, first: int, blocks: Sequence[ShardedTensor]
) -> Iterator[ShardedTensor]:
    """Cut a flat range of a parameter's elements into rectangles.

    Args:
        prefix: prefix of the rectangles' names.
        flat: the values of the range [elements].
        first: number of its first element in the parameter.
        blocks: rectangles of stored tensors that make up the parameter, one below the other.
    """
    last = first + flat.numel()
    block_first = 0
    for block in blocks:
        block_last = block_first + block.data.numel()
        # The elements that the range and the block share, counted from the block's first.
        start = max(first, block_first) - block_first
        stop = min(last, block_last) - block_first
        for rectangle in rectangles_of_range(start, stop, tuple(block.local_shape)):
            # Axes of the stored tensor that a block has not: the layer, where layers are stacked.
            num_leading = len(block.global_shape) - len(rectangle.shape)
            from_flat = slice(
                block_first + rectangle.start - first, block_first + rectangle.stop - first
            )
            data = flat[from_flat].view((1,) * num_leading + rectangle.shape)
            leading_offset = block.global_offset[:num_leading]
            block_offset = block.global_offset[num_leading:]
            offset = [a + b for a, b in zip(block_offset, rectangle.corner, strict=True)]
            yield ShardedTensor(
                key=prefix + block.key,
                data=data,
                dtype=data.dtype,
                local_shape=tuple(data.shape),
                global_shape=tuple(block.global_shape),
                global_offset=(*leading_offset, *offset),
                axis_fragmentations=None,  # the rectangles are no regular grid
                # The last number counts copies on replicas, of which one is saved. Here every
                # replica owns other elements, so all are saved.
                replica_id=(*block.replica_id[:2], 0),
            )
        block_first = block_last


class Rectangle(NamedTuple):
    """A part of a flat range that is a rectangle of the tensor.

    Attributes:
        start, stop: range of its elements in the flattened tensor.
        shape: shape of the rectangle.
        corner: index of its first element in the tensor.
    """

    start: int
    stop: int
    shape: tuple[int, ...]
    corner: tuple[int, ...]


def rectangles_of_range(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Rectangle]:
    """Cut elements `start` to `stop` (exclusive) of a tensor of one or two axes into rectangles.

    >>> [tuple(rectangle) for rectangle in rectangles_of_range(3, 17, (4, 5))]
    [(3, 5, (1, 2), (0, 3)), (5, 15, (2, 5), (1, 0)), (15, 17, (1, 2), (3, 0))]
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield Rectangle(start, stop, (stop - start,), (start,))
        return
    width = shape[1]
    # The whole rows in the range are elements body to tail; there are none where body >= tail.
    body = min(stop, ceil_div(start, width) * width)
    tail = max(start, stop // width * width)
    if start < body:
        yield Rectangle(start, body, (1, body - start), (start // width, start % width))
    if body < tail:
        yield Rectangle(body, tail, ((tail - body) // width, width), (body // width, 0))
    # body > tail where the range ends in the row it starts in: the head is then all of it.
    if max(body, tail) < stop:
        yield Rectangle(tail, stop, (1, stop - tail), (tail // width, 0))

"""A micro-batch as one rank needs it: cut out of the whole before the step, in page-locked memory
where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from llada.model.attention import Kernel, SegmentLengths, segment_lengths
from llada.objectives.base import Batch, Segments


@dataclass(frozen=True)
class RankBatch:
    """This context rank's contiguous part of a micro-batch, on CPU.

    Attributes:
        inputs: [b, s] int64, s = L / context ranks.
        positions: [s] int64, rotary positions.
        layout: attention segments of the whole rows.
        first: index of the first token of this part in the row.
        indices: of each predicted position in this part, into the flattened [s, b] hidden states,
            int64 [n].
        targets: clean tokens there, int64 [n].
        weights: float32 [n].
        segments: id of each predicted position's segment among all of the step, int64 [n].
        normaliser: one number per global step.
        lengths: cumulative segment lengths for a variable-length attention kernel; None where none
            is used.
    """

    inputs: torch.Tensor
    positions: torch.Tensor
    layout: Segments
    first: int
    indices: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    segments: torch.Tensor
    normaliser: float
    lengths: SegmentLengths | None

    def pin_memory(self) -> RankBatch:
        """The same in page-locked memory, from where copies to a GPU need not be waited for."""
        return _with_tensors(self, lambda tensor: tensor.contiguous().pin_memory())

    def to(self, device: torch.device) -> RankBatch:
        """The same on `device`, but for `segments`; the copies are queued, not waited for."""

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            # Only a validation adds the losses up by segment, and copies these itself.
            if tensor is self.segments:
                return tensor
            return tensor.to(device, non_blocking=True)

        return _with_tensors(self, copy)


def rank_batch(batch: Batch, rank: int, size: int, kernel: Kernel | None) -> RankBatch:
    """Cut a micro-batch for one of `size` context ranks.

    Args:
        batch: complete rows.
        rank, size: of the context group.
        kernel: the run's variable-length attention kernel, if any; `lengths` are computed for it.
    """
    share = batch.inputs.shape[1] // size
    first = rank * share
    # in the batch's order
    here = ((batch.columns >= first) & (batch.columns < first + share)).nonzero().squeeze(1)
    return RankBatch(
        inputs=batch.inputs[:, first : first + share],
        positions=batch.positions[first : first + share],
        layout=batch.layout,
        first=first,
        indices=(batch.columns[here] - first) * batch.inputs.shape[0] + batch.rows[here],
        targets=batch.targets[here],
        weights=batch.weights[here],
        segments=batch.segments[here],
        normaliser=batch.normaliser,
        lengths=segment_lengths(batch.layout, first, share)
        if kernel is not None and kernel.computes(batch.layout)
        else None,
    )


def _with_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a dataclass whose tensors, those of nested SegmentLengths included, went through
    `change`.
    """
    changed: dict[str, Any] = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, torch.Tensor):
            changed[field.name] = change(part)
        elif isinstance(part, SegmentLengths):
            changed[field.name] = _with_tensors(part, change)
    return replace(value, **changed)

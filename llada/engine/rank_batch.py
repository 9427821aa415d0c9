"""The part of a micro-batch that one rank needs.

It is cut out of the whole micro-batch in the loader's thread, and kept in page-locked memory if
there is a GPU, so that its copy to the GPU runs in the background.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from llada.model.attention import Kernel, SegmentLengths, segment_lengths
from llada.objectives.base import Batch, Segments


@dataclass(frozen=True)
class RankBatch:
    """The contiguous part of a micro-batch that belongs to one context rank.

    Attributes:
        inputs: int64 [b, s], s = L / context ranks.
        positions: Rotary positions, int64 [s].
        layout: Attention segments of the whole rows.
        first: Position of this part's first token in the row.
        indices: Predicted positions in this part, as rows of the hidden states flattened to
            [s b, d], int64 [n].
        targets: Clean tokens of the predicted positions, int64 [n].
        weights: Their weights in the loss, float32 [n].
        segments: Their segment ids among all segments of the step, int64 [n].
        normalizer: Divides the sum of the weighted losses; None in a validation.
        lengths: Segment lengths for the variable-length attention kernel; None if it is not used.
    """

    inputs: torch.Tensor
    positions: torch.Tensor
    layout: Segments
    first: int
    indices: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    segments: torch.Tensor
    normalizer: float | None
    lengths: SegmentLengths | None

    def pin_memory(self) -> RankBatch:
        """A copy in page-locked memory, except `segments`, which stay on the host."""

        def pin(tensor: torch.Tensor) -> torch.Tensor:
            if tensor is self.segments:
                return tensor
            return tensor.contiguous().pin_memory()

        return self._map_tensors(pin)

    def to(self, device: torch.device) -> RankBatch:
        """A copy on `device`, except `segments`. The copies are queued and not waited for."""

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            # Only a validation adds the losses up by segment, and copies these itself.
            if tensor is self.segments:
                return tensor
            return tensor.to(device, non_blocking=True)

        return self._map_tensors(copy)

    def _map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> RankBatch:
        lengths = self.lengths
        if lengths is not None:
            lengths = replace(lengths, queries=change(lengths.queries), keys=change(lengths.keys))
        return replace(
            self,
            inputs=change(self.inputs),
            positions=change(self.positions),
            indices=change(self.indices),
            targets=change(self.targets),
            weights=change(self.weights),
            segments=change(self.segments),
            lengths=lengths,
        )


def rank_batch(batch: Batch, rank: int, size: int, kernel: Kernel | None) -> RankBatch:
    """Cut a micro-batch for one context rank.

    Args:
        batch: Complete rows.
        rank: Of the context group.
        size: Of the context group.
        kernel: The run's variable-length attention kernel, if it has one.
    """
    num_rows, row_length = batch.inputs.shape
    length = row_length // size
    first = rank * length
    # Predicted positions of this part, in the order of the batch.
    in_part = (batch.columns >= first) & (batch.columns < first + length)
    own = in_part.nonzero().squeeze(1)
    lengths = None
    if kernel is not None and kernel.computes(batch.layout):
        lengths = segment_lengths(batch.layout, first, length)
    return RankBatch(
        inputs=batch.inputs[:, first : first + length],
        positions=batch.positions[first : first + length],
        layout=batch.layout,
        first=first,
        # Hidden states are [s, b, d]: token (column, row) is at column * b + row.
        indices=(batch.columns[own] - first) * num_rows + batch.rows[own],
        targets=batch.targets[own],
        weights=batch.weights[own],
        segments=batch.segments[own],
        normalizer=batch.normalizer,
        lengths=lengths,
    )

"""The part of a micro-batch that one rank needs.

It is cut out of the whole micro-batch in the loader's thread, and kept in page-locked memory if
there is a GPU, so that its copy to the GPU runs in the background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from llada.model.attention import Kernel, SegmentLengths, segment_lengths
from llada.objectives import Batch, BatchTerms, Layout
from llada.objectives.losses import HeadTerms


@dataclass(frozen=True)
class RankBatch:
    """The contiguous part of a micro-batch that belongs to one context rank.

    Attributes:
        inputs: int64 [b, s], s = M / context ranks.
        row_length: M, tokens of a whole row.
        positions: Rotary positions, int64 [s].
        layout: Attention segments of the whole rows.
        first: Position of this part's first token in the row.
        terms: The terms of the loss that read this part, by head.
        normalizer: Divides the sum of the weighted losses; None in a validation.
        lengths: Segment lengths for the variable-length attention kernel; None if it is not used.
    """

    inputs: torch.Tensor
    row_length: int
    positions: torch.Tensor
    layout: Layout
    first: int
    terms: Mapping[str, HeadTerms]
    normalizer: float | None
    lengths: SegmentLengths | None

    def pin_memory(self) -> RankBatch:
        """A copy in page-locked memory, except the terms' groups, which stay on the host."""
        return self._map_tensors(lambda tensor: tensor.contiguous().pin_memory())

    def to(self, device: torch.device) -> RankBatch:
        """A copy on `device`, except the terms' groups; it is queued and not waited for."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def _map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> RankBatch:
        lengths = self.lengths
        if lengths is not None:
            lengths = replace(lengths, queries=change(lengths.queries), keys=change(lengths.keys))
        return replace(
            self,
            inputs=change(self.inputs),
            positions=change(self.positions),
            terms={head: terms.map_on_device(change) for head, terms in self.terms.items()},
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
    lengths = None
    if kernel is not None and kernel.computes(batch.layout, length):
        lengths = segment_lengths(batch.layout, first, length)
    return RankBatch(
        inputs=batch.inputs[:, first : first + length],
        row_length=row_length,
        positions=batch.positions[first : first + length],
        layout=batch.layout,
        first=first,
        terms={
            head: _terms_of_part(terms, first, length, num_rows)
            for head, terms in batch.terms.items()
        },
        normalizer=batch.normalizer,
        lengths=lengths,
    )


def _terms_of_part(terms: BatchTerms, first: int, length: int, num_rows: int) -> HeadTerms:
    """Choose the terms that read columns first..first+length-1, in the order of the batch."""
    in_part = (terms.columns >= first) & (terms.columns < first + length)
    own = in_part.nonzero().squeeze(1)
    return HeadTerms(
        # Hidden states are [s, b, d]: token (column, row) is at column * b + row.
        indices=(terms.columns[own] - first) * num_rows + terms.rows[own],
        targets=terms.targets[own],
        weights=terms.weights[own],
        groups=terms.groups[own],
        aux={name: values[own] for name, values in terms.aux.items()},
    )

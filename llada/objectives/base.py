"""The interface of an objective, and the Batch that goes to the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from llada.arrays import F64, I64


@dataclass(frozen=True)
class Window:
    """Clean tokens of one sample, cut into attention segments.

    Attributes:
        sample: global sample index; the key of its masks.
        tokens: [L] int64.
        bounds: segment boundaries 0 = b_0 < ... < b_n = L, int64 [n + 1].
        t: diffusion time of each segment in [0, 1), float64 [n].
        segment: id of the first segment among all segments of the step (or validation); the others
            follow in order.
        spans: maskable positions [start, stop) of each segment, int64 [n, 2]; None: whole segments.
            In fine-tuning these are the response and its padding.
        scales: factor on the weights of each segment, float64 [n]; None: 1.
    """

    sample: int
    tokens: I64
    bounds: I64
    t: F64
    segment: int
    spans: I64 | None = None
    scales: F64 | None = None

    def maskable(self) -> tuple[I64, F64]:
        """Spans [n, 2] and scales [n] of all segments, with the defaults filled in."""
        spans = self.spans
        if spans is None:
            spans = np.stack([self.bounds[:-1], self.bounds[1:]], axis=1)
        scales = self.scales
        if scales is None:
            scales = np.ones(len(spans))
        return spans, scales

    def segments(self) -> Iterator[tuple[int, int, float, float]]:
        """Of every segment: start and stop of its maskable span, its t, and its scale."""
        spans, scales = self.maskable()
        for (start, stop), t, scale in zip(
            spans.tolist(), self.t.tolist(), scales.tolist(), strict=True
        ):
            yield start, stop, t, scale


@dataclass(frozen=True)
class Corrupted:
    """A window after corruption: what the model reads, and which positions it must predict.

    Attributes:
        inputs: [L] int64, with [MASK] where corrupted.
        predicted: positions with a non-zero weight, int64 [n], increasing.
        weights: weight of each predicted position in the loss, float64 [n].
    """

    inputs: I64
    predicted: I64
    weights: F64


class Objective(Protocol):
    """From clean tokens and keys to corrupted tokens and weights."""

    @property
    def token_loss(self) -> str:
        """Name in `llada.model.token_losses.KERNELS` of the loss per position."""
        ...

    def corrupt(
        self, window: Window, *, masking: str | None = None, purpose: str = "train"
    ) -> Corrupted:
        """Corrupt one window.

        Args:
            window: clean tokens, segments and their t.
            masking: replaces the objective's own (validation always uses "fixed_count").
            purpose: name of the noise, "train" or "validation".
        """
        ...

    def expected_predictions(self, lengths: np.ndarray, t: np.ndarray) -> float:
        """Mean number of predicted positions, for counting FLOPs before anything is drawn.

        Args:
            lengths: number of maskable tokens of each segment [n].
            t: diffusion time of each segment [n].
        """
        ...


@dataclass(frozen=True)
class Segments:
    """Attention layout: tokens attend within their own segment, in both directions.

    Passes through the model in the place of Megatron-Core's `packed_seq_params`; tensors stay
    [s, b, h, d].

    Attributes:
        bounds: for each row of the micro-batch the boundaries 0 = b_0 < ... < b_n = L, of the whole
            sequence even if context-parallel ranks share it.
        length: L.
    """

    bounds: tuple[tuple[int, ...], ...]
    length: int
    # Megatron-Core reads these on any packed_seq_params. "sbhd" and no offsets: nothing is packed.
    qkv_format: str = "sbhd"
    cu_seqlens_q: None = None
    cu_seqlens_kv: None = None
    cu_seqlens_q_padded: None = None
    cu_seqlens_kv_padded: None = None
    cp_group: None = None

    def whole(self) -> bool:
        """Whether every row is a single segment."""
        return all(len(row) == 2 for row in self.bounds)

    def groups(self) -> dict[tuple[int, ...], list[int]]:
        """Boundaries -> the rows that have them, so that equal rows are computed together."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, bounds in enumerate(self.bounds):
            rows.setdefault(bounds, []).append(row)
        return rows


@dataclass(frozen=True)
class Batch:
    """One micro-batch on CPU, complete; the engine takes the part of each rank.

    Attributes:
        inputs: [b, L] int64.
        positions: [L] int64, rotary positions; they run through the row without restarting at
            documents, which changes nothing since RoPE is relative.
        layout: attention segments.
        rows, columns: row and column of each predicted position, int64 [n]; sorted by (column,
            row), the order of [s, b] tensors.
        targets: clean token at each predicted position, int64 [n].
        weights: factor on the loss of each predicted position, float32 [n].
        segments: id of the segment of each predicted position among those of the step, int64 [n].
        normalizer: divides the sum of the weighted losses; the same in all micro-batches of a step.
            None in a validation, which adds up by segment and divides nothing.
    """

    inputs: torch.Tensor
    positions: torch.Tensor
    layout: Segments
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    segments: torch.Tensor
    normalizer: float | None = None


def collate(
    windows: Sequence[Window], corrupted: Sequence[Corrupted], normalizer: float | None = None
) -> Batch:
    """Stack windows of equal length, and what corruption made of each, into a Batch."""
    length = len(windows[0].tokens)

    # Each array has one entry for every predicted position of the micro-batch, row after row.
    counts = [len(c.predicted) for c in corrupted]
    rows = np.repeat(np.arange(len(corrupted), dtype=np.int64), counts)
    columns = np.concatenate([c.predicted for c in corrupted])
    targets = np.concatenate(
        [w.tokens[c.predicted] for w, c in zip(windows, corrupted, strict=True)]
    )
    weights = np.concatenate([c.weights for c in corrupted])
    segments = np.concatenate(
        [_segments_of(w)[c.predicted] for w, c in zip(windows, corrupted, strict=True)]
    )

    order = _by_column(rows, columns, len(corrupted), length)
    return Batch(
        inputs=torch.from_numpy(np.stack([c.inputs for c in corrupted])),
        positions=torch.arange(length),
        layout=Segments(tuple(tuple(w.bounds.tolist()) for w in windows), length),
        rows=torch.from_numpy(rows[order]),
        columns=torch.from_numpy(columns[order]),
        targets=torch.from_numpy(targets[order]),
        weights=torch.from_numpy(weights[order].astype(np.float32)),
        segments=torch.from_numpy(segments[order]),
        normalizer=normalizer,
    )


def _by_column(rows: I64, columns: I64, count: int, length: int) -> I64:
    """The order of predicted positions by column and then by row, int64 [n].

    A counting sort over the [length, count] slots of a micro-batch, each of which holds at most one
    position. Example: positions (row, column) = (0, 2), (1, 0), (1, 2) of two rows of length 3 fill
    the slots 4, 1 and 5 of 6, so their order is 1, 0, 2.
    """
    slots = np.full(length * count, -1, dtype=np.int64)
    slots[columns * count + rows] = np.arange(len(rows))
    return slots[slots >= 0]


def _segments_of(window: Window) -> I64:
    """Id of the segment of every position, int64 [L]."""
    sizes = np.diff(window.bounds)
    return np.repeat(window.segment + np.arange(len(sizes), dtype=np.int64), sizes)

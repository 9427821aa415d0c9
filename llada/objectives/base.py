"""What an objective is, and the Batch that it hands to the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """Clean tokens of one sample, cut into attention segments.

    Attributes:
        sample: global sample index; the key of its masks.
        tokens: [L] int64.
        bounds: segment boundaries 0 = b_0 < ... < b_n = L, int64 [n + 1].
        t: diffusion time of each segment in [0, 1), float64 [n].
        segment: id of the first segment among all segments of the step (or validation); they are
            numbered in order.
        spans: first and past-the-last position of each segment that may be masked, int64 [n, 2];
            None: the whole segments.
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
        """Spans and scales of all segments, the defaults filled in."""
        spans = (
            np.stack([self.bounds[:-1], self.bounds[1:]], axis=1)
            if self.spans is None
            else self.spans
        )
        return spans, np.ones(len(spans)) if self.scales is None else self.scales

    def segments(self) -> Iterator[tuple[int, int, float, float]]:
        """Of every segment: first and past-the-last position that may be masked, its t, and the
        factor on its weights.
        """
        spans, scales = self.maskable()
        for (start, end), t, scale in zip(
            spans.tolist(), self.t.tolist(), scales.tolist(), strict=True
        ):
            yield start, end, t, scale


@dataclass(frozen=True)
class Corrupted:
    """One window after corruption: what the model reads and which positions it must predict.

    Attributes:
        inputs: [L] int64, with [MASK] where corrupted.
        predicted: positions with a non-zero weight, int64 [n], increasing.
        weights: their weights, float64 [n].
    """

    inputs: I64
    predicted: I64
    weights: F64


class Objective(Protocol):
    """Clean tokens plus keys -> corrupted tokens and weights."""

    @property
    def token_loss(self) -> str:
        """Name of the kernel from logits to a loss per position
        (`llada.model.token_losses.KERNELS`).
        """
        ...

    def corrupt(
        self, window: Window, *, masking: str | None = None, purpose: str = "train"
    ) -> Corrupted:
        """Corrupt one window. `masking` overrides the objective's own (validation is always
        fixed_count).
        """
        ...

    def expected_predictions(self, lengths: np.ndarray, t: np.ndarray) -> float:
        """Mean number of predicted positions in segments with so many maskable tokens at
        these t.
        """
        ...


@dataclass(frozen=True)
class Segments:
    """Attention layout: tokens attend within their own segment, in both directions.

    Travels through the model where Megatron-Core expects `packed_seq_params`; tensors stay [s, b,
    h, d].

    Attributes:
        bounds: per row of the micro-batch the boundaries 0 = b_0 < ... < b_n = L (int64, whole
            sequence, all context ranks).
        length: L.
    """

    bounds: tuple[tuple[int, ...], ...]
    length: int
    # Read by Megatron-Core on any packed_seq_params:
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
        """Rows by their boundaries, so that equal rows are computed together."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, bounds in enumerate(self.bounds):
            rows.setdefault(bounds, []).append(row)
        return rows


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on CPU, complete for every rank: the engine takes each rank's part.

    Attributes:
        inputs: [b, L] int64.
        positions: [L] int64, rotary positions; they run through the row and do not restart at
            documents.
        layout: attention segments.
        rows, columns: of each predicted position, int64 [n]; sorted by (column, row), the order of
        [s, b] tensors.
        targets: clean tokens there, int64 [n].
        weights: float32 [n]; the loss of the micro-batch is sum(weights * loss) / normaliser.
        segments: id of each predicted position's segment among all of the step, int64 [n].
        normaliser: one number per global step, the same in all its micro-batches.
    """

    inputs: torch.Tensor
    positions: torch.Tensor
    layout: Segments
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    segments: torch.Tensor
    normaliser: float


def collate(windows: Sequence[Window], corrupted: Sequence[Corrupted], normaliser: float) -> Batch:
    """Stack corrupted windows of equal length into a Batch."""
    length = len(windows[0].tokens)
    rows = np.repeat(
        np.arange(len(corrupted), dtype=np.int64), [len(c.predicted) for c in corrupted]
    )
    columns = np.concatenate([c.predicted for c in corrupted])
    order = _by_column(rows, columns, len(corrupted), length)
    targets = np.concatenate(
        [w.tokens[c.predicted] for w, c in zip(windows, corrupted, strict=True)]
    )
    weights = np.concatenate([c.weights for c in corrupted])
    segments = np.concatenate(
        [_segments_of(w)[c.predicted] for w, c in zip(windows, corrupted, strict=True)]
    )
    return Batch(
        inputs=torch.from_numpy(np.stack([c.inputs for c in corrupted])),
        positions=torch.arange(length),
        layout=Segments(tuple(tuple(w.bounds.tolist()) for w in windows), length),
        rows=torch.from_numpy(rows[order]),
        columns=torch.from_numpy(columns[order]),
        targets=torch.from_numpy(targets[order]),
        weights=torch.from_numpy(weights[order].astype(np.float32)),
        segments=torch.from_numpy(segments[order]),
        normaliser=float(normaliser),
    )


def _by_column(rows: I64, columns: I64, count: int, length: int) -> I64:
    """The order of predicted positions, each in at most one place of [count, length], by column and
    then by row; a counting sort.
    """
    slots = np.full(length * count, -1, dtype=np.int64)
    slots[columns * count + rows] = np.arange(len(rows))
    return slots[slots >= 0]


def _segments_of(window: Window) -> I64:
    """Id of the segment of every position, int64 [L]."""
    sizes = np.diff(window.bounds)
    return np.repeat(window.segment + np.arange(len(sizes), dtype=np.int64), sizes)

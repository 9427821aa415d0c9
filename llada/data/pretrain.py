"""Pretraining data: windows that tile the shards, cut into segments by documents and random
lengths.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llada.data.base import F64, I64, TRAIN, VALIDATION, DrawT, StepPlan, TrainingData, check_tokens
from llada.data.corpus import TEXT, Corpus
from llada.noise import random_lengths, timesteps


class WindowReader:
    """The windows of one split of a corpus: each shard tiled by `length` tokens, its incomplete
    last window left out.

    Where a window lies follows from the token counts of the manifest; no table of windows is made.

    Attributes:
        corpus: whose split it is.
        count: how many windows there are.
        dropped: tokens in the incomplete last windows.
    """

    def __init__(self, corpus: Corpus, split: str, length: int) -> None:
        self.corpus, self.split, self.length = corpus, split, length
        self.shards = corpus.shards(split)
        sizes = np.array([entry.tokens for entry in self.shards.entries], dtype=np.int64)
        self.firsts = np.concatenate([[0], np.cumsum(sizes // length)]).astype(np.int64)
        self.first_documents = np.cumsum(
            [0, *(entry.documents for entry in self.shards.entries)], dtype=np.int64
        )
        self.count = int(self.firsts[-1])
        self.dropped = int(sizes.sum()) - self.count * length

    def _place(self, window: int) -> tuple[int, int]:
        """The shard and the window's first token in it."""
        shard = int(self.firsts.searchsorted(window, side="right")) - 1
        return shard, (window - int(self.firsts[shard])) * self.length

    def tokens(self, window: int) -> I64:
        """Token ids [length]. Raises UserError when they cannot be this corpus's."""
        shard, start = self._place(window)
        return check_tokens(
            self.corpus, self.shards.tokens(shard, start, start + self.length), f"window {window}"
        )

    def document_starts(self, window: int) -> I64:
        """Positions 1..length-1 in the window at which a document starts."""
        shard, start = self._place(window)
        return self.shards.document_starts(shard, start, start + self.length) - start

    def documents(self, window: int) -> I64:
        """Number in the split of every document of which the window holds a part, in order."""
        shard, start = self._place(window)
        first = self.first_documents[shard] + self.shards.document_at(shard, start)
        return first + np.arange(len(self.document_starts(window)) + 1, dtype=np.int64)

    def tokens_per_byte(self) -> float:
        _, tokens, text_bytes = self.corpus.manifest.totals(self.split)
        return tokens / text_bytes

    def summary(self) -> str:
        return (
            f"{self.count:,} windows, {self.dropped:,} tokens in incomplete last windows are not"
            " trained on"
        )


class PretrainData(TrainingData):
    """Windows of text. The loss of a step is normalised by its tokens; each segment counts by its
    length.
    """

    kind = TEXT

    def reader(self, source: int, split: str) -> WindowReader:
        return WindowReader(self.corpora[source], split, self.config.data.sequence_length)

    def plan(self, step: int) -> StepPlan:
        config = self.config
        samples = step * config.batch.global_ + np.arange(config.batch.global_, dtype=np.int64)
        sources, windows = self.mixture.places(samples)
        cuts = random_lengths(
            config.seed, samples, config.data.sequence_length, config.data.random_length_probability
        )
        rows, positions = self._bounds(TRAIN, sources, windows, cuts)
        return _assemble(
            samples,
            sources,
            windows,
            rows,
            positions,
            lambda shares: timesteps(config.seed, step, shares, config.objective.timesteps),
        )

    @property
    def unit(self) -> str:  # type: ignore[override]  # it follows from a setting
        return "documents" if self.config.data.document_mask else "windows"

    def validation_plan(
        self, draws: I64, source: int, items: I64, sweeps: I64, draw_t: DrawT
    ) -> StepPlan:
        length, sources = self.config.data.sequence_length, np.full(len(draws), source)
        rows, positions = self._bounds(VALIDATION, sources, items, np.full(len(draws), length))
        ends = np.flatnonzero(positions > 0)
        # its first token in the split names a segment
        texts = items[rows[ends]] * length + positions[ends - 1]
        return _assemble(
            draws, sources, items, rows, positions, lambda _: draw_t(rows[ends], texts)
        )

    def owners(self, plan: StepPlan) -> I64:
        if not self.config.data.document_mask:
            return plan.items
        parts = [
            self._windows(VALIDATION, s).documents(w)
            for s, w in zip(plan.sources.tolist(), plan.items.tolist(), strict=True)
        ]
        return np.concatenate(parts)

    def _bounds(self, split: str, sources: I64, windows: I64, cuts: I64) -> tuple[I64, I64]:
        """Segment boundaries of windows: their ends, the random lengths and, with
        data.document_mask, the document starts.

        Returns:
            int64 [boundaries], int64 [boundaries]: the row of each boundary and its position,
            sorted by row and position.
        """
        length, rows = self.config.data.sequence_length, np.arange(len(windows), dtype=np.int64)
        width = length + 1  # positions 0..length
        keys = [rows * width, rows * width + cuts, rows * width + length]
        if self.config.data.document_mask:
            starts = [
                self._windows(split, s).document_starts(w)
                for s, w in zip(sources.tolist(), windows.tolist(), strict=True)
            ]
            keys.append(
                np.repeat(rows * width, [len(row) for row in starts]) + np.concatenate(starts)
            )
        found = np.unique(np.concatenate(keys))
        owners = found // width
        return owners, found - owners * width

    def tokens(self, split: str, source: int, item: int) -> I64:
        return self._windows(split, source).tokens(item)

    def describe(self, source: int, item: int) -> str:
        return (
            f"window {item}, {len(self._windows(TRAIN, source).document_starts(item)) + 1}"
            " documents"
        )

    def _windows(self, split: str, source: int) -> WindowReader:
        reader = self.readers[split][source]
        assert isinstance(reader, WindowReader)
        return reader


def _assemble(
    samples: I64,
    sources: I64,
    windows: I64,
    rows: I64,
    positions: I64,
    draw_t: Callable[[F64], F64],
) -> StepPlan:
    """A plan of whole windows.

    Args:
        samples, sources, windows: see StepPlan.
        rows, positions: of the segment boundaries, sorted.
        draw_t: the lengths of all segments, which are their shares of the loss -> their t.
    """
    ends = np.flatnonzero(positions > 0)
    spans = np.stack([positions[ends - 1], positions[ends]], axis=1)
    lengths = (spans[:, 1] - spans[:, 0]).astype(np.float64)
    first_bounds = np.searchsorted(rows, np.arange(len(samples) + 1))
    bounds = [
        positions[first:last]
        for first, last in zip(first_bounds[:-1].tolist(), first_bounds[1:].tolist(), strict=True)
    ]
    firsts = first_bounds - np.arange(len(samples) + 1)  # a row has one boundary more than segments
    return StepPlan(
        samples,
        sources,
        windows,
        bounds,
        firsts,
        spans,
        np.ones(len(spans)),
        draw_t(lengths),
        float(lengths.sum()),
    )

"""Pretraining data: windows that tile the shards, cut into segments by documents and random
lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from llada.arrays import F64, I64
from llada.data.corpus import Corpus
from llada.data.manifest import TEXT, TRAIN, VALIDATION
from llada.data.step_plan import DrawT, StepPlan
from llada.data.training_data import TrainingData, check_tokens
from llada.noise import random_lengths, timesteps


class WindowReader:
    """The windows of one split of a corpus.

    Each shard is tiled by windows of `length` tokens; its incomplete last window is left out. With
    a length of 8, shards of 20 and 30 tokens hold windows 0..1 and 2..4, and 4 + 6 tokens are
    dropped. Where a window lies follows from the token counts of the manifest; no table of windows
    is made.

    Attributes:
        corpus: the corpus.
        num_instances: how many windows there are.
        dropped: tokens in the incomplete last windows.
        first_windows: number of the first window of every shard, int64 [shards + 1].
    """

    def __init__(self, corpus: Corpus, split: str, length: int) -> None:
        self.corpus = corpus
        self.split = split
        self.length = length
        self.shards = corpus.shards(split)
        sizes = np.array([shard.num_tokens for shard in self.shards], dtype=np.int64)
        documents = [shard.num_documents for shard in self.shards]
        self.first_windows: I64 = np.concatenate([[0], np.cumsum(sizes // length)]).astype(np.int64)
        self.first_documents = np.cumsum([0, *documents], dtype=np.int64)
        self.num_instances = int(self.first_windows[-1])
        self.dropped = int(sizes.sum()) - self.num_instances * length

    def _locate(self, window: int) -> tuple[int, int]:
        """Return the shard of a window, and the window's first token in it."""
        shard = int(self.first_windows.searchsorted(window, side="right")) - 1
        return shard, (window - int(self.first_windows[shard])) * self.length

    def tokens(self, window: int) -> I64:
        """Read token ids [length]. Raises UserError when they cannot be this corpus's."""
        shard, start = self._locate(window)
        tokens = self.shards[shard].tokens(start, start + self.length)
        return check_tokens(self.corpus, tokens, f"window {window}")

    def document_starts(self, window: int) -> I64:
        """Return the positions 1..length-1 in the window at which a document starts."""
        shard, start = self._locate(window)
        return self.shards[shard].document_starts(start, start + self.length) - start

    def documents(self, window: int) -> I64:
        """Return the number in the split of every document in the window, in order.

        The first and the last may lie in it only in part.
        """
        shard, start = self._locate(window)
        first = self.first_documents[shard] + self.shards[shard].document_at(start)
        return first + np.arange(len(self.document_starts(window)) + 1, dtype=np.int64)

    def tokens_per_byte(self) -> float:
        _, tokens, text_bytes = self.corpus.manifest.totals(self.split)
        return tokens / text_bytes

    def summary(self) -> str:
        return (
            f"{self.num_instances:,} windows, {self.dropped:,} tokens in incomplete last windows"
            " are not trained on"
        )

    def too_long(self) -> list[dict[str, int]]:
        """Return nothing: a window is never too long."""
        return []


class PretrainData(TrainingData):
    """Windows of text.

    The loss of a step is normalized by its tokens; each segment counts by its length.
    """

    kind = TEXT
    readers: Mapping[str, Sequence[WindowReader]]

    def normalizer(self, plan: StepPlan) -> float:
        return float(plan.tokens)

    @property
    def item_name(self) -> str:
        if self.config.data.document_mask:
            return "documents"
        return "windows"

    def open_reader(self, corpus: int, split: str) -> WindowReader:
        return WindowReader(self.corpora[corpus], split, self.config.data.sequence_length)

    def plan(self, step: int) -> StepPlan:
        config = self.config
        first = step * config.batch.global_
        samples = first + np.arange(config.batch.global_, dtype=np.int64)
        corpora, windows = self.mixture.lookup(samples)
        cuts = random_lengths(
            config.seed, samples, config.data.sequence_length, config.data.random_length_probability
        )
        rows, positions = self._bounds(TRAIN, corpora, windows, cuts)

        def draw_t(shares: F64) -> F64:
            return timesteps(config.seed, step, shares, config.objective.timesteps)

        return _assemble(samples, corpora, windows, rows, positions, draw_t)

    def validation_plan(
        self, draws: I64, corpus: int, instances: I64, sweeps: I64, draw_t: DrawT
    ) -> StepPlan:
        length = self.config.data.sequence_length
        corpora = np.full(len(draws), corpus)
        uncut = np.full(len(draws), length)
        rows, positions = self._bounds(VALIDATION, corpora, instances, uncut)
        ends = np.flatnonzero(positions > 0)
        # Draws of one segment must share its text's number: its first token in the split serves.
        texts = instances[rows[ends]] * length + positions[ends - 1]
        return _assemble(
            draws, corpora, instances, rows, positions, lambda _: draw_t(rows[ends], texts)
        )

    def owners(self, plan: StepPlan) -> I64:
        if not self.config.data.document_mask:
            return plan.examples
        readers = self.readers[VALIDATION]
        documents = [
            readers[corpus].documents(window)
            for corpus, window in zip(plan.corpora.tolist(), plan.examples.tolist(), strict=True)
        ]
        return np.concatenate(documents)

    def tokens(self, split: str, corpus: int, example: int) -> I64:
        return self.readers[split][corpus].tokens(example)

    def describe_example(self, corpus: int, example: int) -> str:
        starts = self.readers[TRAIN][corpus].document_starts(example)
        return f"window {example}, {len(starts) + 1} documents"

    def _bounds(self, split: str, corpora: I64, windows: I64, cuts: I64) -> tuple[I64, I64]:
        """Return the segment boundaries of windows: their ends, the random lengths and, with
        data.document_mask, the document starts.

        Args:
            split, corpora, windows: split, and corpus and window of each row [n].
            cuts: a random length in 1..sequence_length for each row; sequence_length: not cut [n].

        Returns:
            int64 [boundaries], int64 [boundaries]: the row of each boundary and its position,
            sorted by row and position.
        """
        length = self.config.data.sequence_length
        # Boundaries of all rows in one array: row * width + position, position 0..length. With a
        # length of 8 the width is 9, and row 1 cut after 3 tokens has the keys 9, 12 and 17.
        width = length + 1
        first_keys = np.arange(len(windows), dtype=np.int64) * width
        keys = [first_keys, first_keys + cuts, first_keys + length]
        if self.config.data.document_mask:
            readers = self.readers[split]
            starts = [
                readers[corpus].document_starts(window)
                for corpus, window in zip(corpora.tolist(), windows.tolist(), strict=True)
            ]
            counts = [len(of_row) for of_row in starts]
            keys.append(np.repeat(first_keys, counts) + np.concatenate(starts))
        # Sorted, and a boundary that has two reasons counts once.
        unique = np.unique(np.concatenate(keys))
        rows = unique // width
        return rows, unique - rows * width


def _assemble(
    samples: I64,
    corpora: I64,
    windows: I64,
    rows: I64,
    positions: I64,
    draw_t: Callable[[F64], F64],
) -> StepPlan:
    """Make a plan of whole windows.

    Args:
        samples, corpora, windows: see StepPlan.
        rows, positions: row and position of each segment boundary, sorted.
        draw_t: the lengths of all segments, which are their shares of the loss -> their t.
    """
    # Every boundary but the first of its row ends a segment, which the boundary before it begins.
    ends = np.flatnonzero(positions > 0)
    spans = np.stack([positions[ends - 1], positions[ends]], axis=1)
    lengths = (spans[:, 1] - spans[:, 0]).astype(np.float64)
    first_bounds = np.searchsorted(rows, np.arange(len(samples) + 1))
    bounds = [positions[first:last] for first, last in pairwise(first_bounds.tolist())]
    return StepPlan(
        samples=samples,
        corpora=corpora,
        examples=windows,
        bounds=bounds,
        # A row has one boundary more than segments.
        first_segments=first_bounds - np.arange(len(samples) + 1),
        spans=spans,
        scales=np.ones(len(spans)),
        t=draw_t(lengths),
    )

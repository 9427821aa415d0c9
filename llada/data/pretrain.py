"""Pretraining data: windows that tile the shards, cut into segments by documents and random
lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llada.arrays import F64, I64
from llada.data.corpus import Corpus
from llada.data.manifest import TEXT, TRAIN, VALIDATION
from llada.data.step_plan import DrawT, StepPlan
from llada.data.training_data import TrainingData, check_tokens
from llada.noise import random_lengths
from llada.objectives import NoiseGroups


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

    The loss of a step is normalized by its tokens; each noise group counts by its size.
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

        cut = self._cut(len(samples), rows, positions)
        sizes = (cut.spans[:, 1] - cut.spans[:, 0]).astype(np.float64)
        t = self.objective.draw_t(config.seed, step, sizes)
        return _assemble(samples, corpora, windows, cut, t)

    def validation_plan(
        self, draws: I64, corpus: int, instances: I64, sweeps: I64, draw_t: DrawT
    ) -> StepPlan:
        length = self.config.data.sequence_length
        corpora = np.full(len(draws), corpus)
        uncut = np.full(len(draws), length)
        rows, positions = self._bounds(VALIDATION, corpora, instances, uncut)
        cut = self._cut(len(draws), rows, positions)
        # Draws of one group must share its text's number: its first token in the split serves.
        texts = instances[cut.rows] * length + cut.spans[:, 0]
        return _assemble(draws, corpora, instances, cut, draw_t(cut.rows, texts))

    def owners(self, plan: StepPlan) -> I64:
        if not self.config.data.document_mask:
            return plan.examples[plan.rows]
        readers = self.readers[VALIDATION]
        owners = []
        for row, (corpus, window) in enumerate(
            zip(plan.corpora.tolist(), plan.examples.tolist(), strict=True)
        ):
            # Without random lengths the segments of a window are its documents.
            documents = readers[corpus].documents(window)
            segment = np.searchsorted(
                plan.bounds[row], plan.groups_of(row).spans[:, 0], side="right"
            )
            owners.append(documents[segment - 1])
        return np.concatenate(owners)

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

    def _cut(self, num_rows: int, rows: I64, positions: I64) -> _Cut:
        """Cut rows at their segment boundaries, and the segments into the objective's noise groups.

        Args:
            num_rows: number of rows.
            rows, positions: row and position of each segment boundary, sorted.
        """
        # Every boundary but the first of its row ends a segment, which the boundary before it
        # begins.
        ends = np.flatnonzero(positions > 0)
        segments = np.stack([positions[ends - 1], positions[ends]], axis=1)
        spans, owners = self.objective.groups(segments)
        first_bounds = np.searchsorted(rows, np.arange(num_rows + 1))
        return _Cut(
            bounds=[positions[first:last] for first, last in pairwise(first_bounds.tolist())],
            attended=segments[:, 1] - segments[:, 0],
            spans=spans,
            rows=rows[ends][owners],
        )


@dataclass(frozen=True)
class _Cut:
    """The rows of a plan, cut into attention segments and noise groups.

    Attributes:
        bounds: segment boundaries of each row.
        attended: tokens of every segment [segments].
        spans: first and past-the-last position of every group in its row, int64 [g, 2].
        rows: row of every group, int64 [g].
    """

    bounds: list[I64]
    attended: I64
    spans: I64
    rows: I64


def _assemble(samples: I64, corpora: I64, windows: I64, cut: _Cut, t: F64) -> StepPlan:
    """Make a plan of whole windows.

    Args:
        samples, corpora, windows: see StepPlan.
        cut: its rows.
        t: diffusion time of every group [g].
    """
    return StepPlan(
        samples=samples,
        corpora=corpora,
        examples=windows,
        bounds=cut.bounds,
        attended=cut.attended,
        rows=cut.rows,
        groups=NoiseGroups.of_whole_samples(samples[cut.rows], cut.spans, t),
    )

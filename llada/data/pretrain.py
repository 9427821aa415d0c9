"""Pretraining data: windows that tile the shards, cut into segments by documents and random lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llada.data.base import F64, I64, TRAIN, VALIDATION, Plan, TrainingData, check_tokens
from llada.data.corpus import TEXT, Corpus
from llada.data.shards import Shard
from llada.noise import random_lengths, timesteps


class WindowReader:
    """The windows of one split of a corpus: each shard tiled by `length` tokens, its incomplete last window left out.

    Attributes:
        corpus: whose split it is.
        count: how many windows there are.
        dropped: tokens in the incomplete last windows.
    """

    def __init__(self, corpus: Corpus, split: str, length: int) -> None:
        self.corpus, self.split, self.length = corpus, split, length
        self.shards: list[Shard] = corpus.shards(split)
        counts = np.array([shard.num_tokens // length for shard in self.shards], dtype=np.int64)
        self.firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.count = int(self.firsts[-1])
        self.dropped = sum(shard.num_tokens for shard in self.shards) - self.count * length

    def _place(self, window: int) -> tuple[Shard, int]:
        i = int(np.searchsorted(self.firsts, window, side="right")) - 1
        return self.shards[i], (window - int(self.firsts[i])) * self.length

    def tokens(self, window: int) -> I64:
        """Token ids [length]. Raises UserError when they cannot be this corpus's."""
        shard, start = self._place(window)
        return check_tokens(self.corpus, shard.tokens(start, start + self.length), f"window {window}")

    def document_starts(self, window: int) -> I64:
        """Positions 1..length-1 in the window at which a document starts."""
        shard, start = self._place(window)
        return shard.document_starts(start, start + self.length) - start

    def tokens_per_byte(self) -> float:
        _, tokens, text_bytes = self.corpus.manifest.totals(self.split)
        return tokens / text_bytes

    def summary(self) -> str:
        return f"{self.count:,} windows, {self.dropped:,} tokens in incomplete last windows are not trained on"


class PretrainData(TrainingData):
    """Windows of text. The loss of a step is normalised by its tokens; each segment counts by its length."""

    kind = TEXT

    def reader(self, source: int, split: str) -> WindowReader:
        return WindowReader(self.corpora[source], split, self.config.data.sequence_length)

    def plan(self, step: int) -> Plan:
        config = self.config
        samples = step * config.batch.global_ + np.arange(config.batch.global_, dtype=np.int64)
        sources, windows = self._places(samples)
        cuts = random_lengths(config.seed, samples, config.data.sequence_length, config.data.random_length_probability)
        bounds = [self.bounds(TRAIN, *place) for place in zip(sources.tolist(), windows.tolist(), cuts.tolist(), strict=True)]
        return _assemble(samples, sources, windows, bounds, lambda shares: timesteps(config.seed, step, shares, config.objective.timesteps))

    def validation_plan(self, draws: I64, source: int, items: I64, draw_t: Callable[[F64, I64], F64]) -> Plan:
        bounds = [self.bounds(VALIDATION, source, window, self.config.data.sequence_length) for window in items.tolist()]
        owners = np.repeat(draws, [len(b) - 1 for b in bounds])
        return _assemble(draws, np.full(len(draws), source), items, bounds, lambda shares: draw_t(shares, owners))

    def bounds(self, split: str, source: int, window: int, cut: int) -> I64:
        """Segment boundaries of a window: its ends, the random length and, with data.document_mask, the document starts."""
        inner = [np.array([0, cut, self.config.data.sequence_length], dtype=np.int64)]
        if self.config.data.document_mask:
            inner.append(self._windows(split, source).document_starts(window))
        return np.unique(np.concatenate(inner))

    def tokens(self, split: str, source: int, item: int) -> I64:
        return self._windows(split, source).tokens(item)

    def describe(self, source: int, item: int) -> str:
        return f"window {item}, {len(self._windows(TRAIN, source).document_starts(item)) + 1} documents"

    def _windows(self, split: str, source: int) -> WindowReader:
        reader = self.readers[split][source]
        assert isinstance(reader, WindowReader)
        return reader

    def _places(self, samples: I64) -> tuple[I64, I64]:
        places = [self.mixture.locate(sample) for sample in samples.tolist()]
        sources, windows = zip(*places, strict=True)
        return np.array(sources, dtype=np.int64), np.array(windows, dtype=np.int64)


def _assemble(samples: I64, sources: I64, windows: I64, bounds: Sequence[I64], draw_t: Callable[[F64], F64]) -> Plan:
    """A plan of whole windows; `draw_t` maps the lengths of all segments, which are their shares of the loss, to their t."""
    spans = np.concatenate([np.stack([b[:-1], b[1:]], axis=1) for b in bounds])
    firsts = np.concatenate([[0], np.cumsum([len(b) - 1 for b in bounds])]).astype(np.int64)
    lengths = (spans[:, 1] - spans[:, 0]).astype(np.float64)
    return Plan(samples, sources, windows, list(bounds), firsts, spans, np.ones(len(spans)), draw_t(lengths), float(lengths.sum()))

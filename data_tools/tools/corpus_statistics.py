"""Statistics of a prepared corpus for `llada data inspect`, as JSON values; `statistics_report`
formats them.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

from llada.arrays import I64
from llada.data.corpus import Corpus
from llada.data.manifest import SPLITS, Manifest, ShardEntry
from llada.data.shard_reader import ShardReader
from llada.errors import UserError
from llada.tokenizer import Tokenizer

I32 = npt.NDArray[np.int32]

_SHOWN_TOKENS = 40
_MAX_EXACT_DOCUMENTS = 1 << 22
"""Most documents of a split whose lengths are all read."""
_BLOCK = 1 << 10
"""Neighboring documents whose lengths are read at once, if not all are."""


class TokenizerNumbers(TypedDict):
    vocab_size: int
    rows: int
    mask_id: int
    eos_id: int
    tokenizer_fingerprint: str


# `from` is a keyword, so this type cannot be written as a class.
HistogramBar = TypedDict("HistogramBar", {"from": int, "to": int, "documents": int})


class LengthStatistics(TypedDict):
    """Lengths of documents in tokens, EOS included; the quantiles are lengths that occur."""

    documents_read: int
    mean: float
    median: int
    p90: int
    p99: int
    max: int
    histogram: list[HistogramBar]


class WindowStatistics(TypedDict):
    """Windows of `sequence_length` tokens; `tail_tokens` are those after a shard's last window."""

    sequence_length: int
    windows: int
    tail_tokens: int
    tail_share: float


class DocumentSample(TypedDict):
    document: int
    start: str


class SplitStatistics(TypedDict):
    """Statistics of one split, in the order in which they are printed."""

    shards: int
    documents: int
    tokens: int
    text_bytes: int
    bytes_per_token: float
    replies: int
    lengths: LengthStatistics
    windows: NotRequired[WindowStatistics]
    samples: NotRequired[list[DocumentSample]]


class CorpusStatistics(TypedDict):
    """All that `llada data inspect --json` prints."""

    folder: str
    kind: str
    format_version: int
    dtype: str
    source_files: int
    tokenizer: TokenizerNumbers
    skipped: dict[str, int]
    splits: dict[str, SplitStatistics]


def corpus_statistics(
    corpus: Corpus,
    samples: int = 3,
    sequence_length: int | None = None,
    max_exact: int = _MAX_EXACT_DOCUMENTS,
) -> CorpusStatistics:
    """Return the statistics of every split that has documents.

    Args:
        corpus: corpus to describe.
        samples: number of documents of each split whose beginning is decoded.
        sequence_length: tokens of the windows to count; None to count no windows.
        max_exact: most documents of a split whose lengths are all read. Of a larger split, about as
            many lengths are read, in evenly spaced blocks. Counts, tokens, bytes and means are
            always exact.

    Raises:
        UserError: a damaged corpus, a sequence length less than 1.
    """
    if sequence_length is not None and sequence_length < 1:
        raise UserError(f"--sequence-length: {sequence_length} is less than 1")
    manifest = corpus.manifest
    tokenizer = corpus.tokenizer()
    splits: dict[str, SplitStatistics] = {}
    for split in SPLITS:
        if manifest.of(split):
            statistics = _split_statistics(corpus, split, sequence_length, max_exact)
            # Added after the windows, which are optional, to keep the order of SplitStatistics.
            statistics["samples"] = _samples(corpus.shards(split), samples, tokenizer)
            splits[split] = statistics
    return {
        "folder": str(corpus.folder),
        "kind": manifest.kind,
        "format_version": manifest.format_version,
        "dtype": manifest.dtype,
        "source_files": len(manifest.sources),
        "tokenizer": _tokenizer_numbers(manifest),
        "skipped": manifest.skipped,
        "splits": splits,
    }


def _tokenizer_numbers(manifest: Manifest) -> TokenizerNumbers:
    return {
        "vocab_size": manifest.vocab_size,
        "rows": manifest.padded_vocab_size,
        "mask_id": manifest.mask_id,
        "eos_id": manifest.eos_id,
        "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
    }


def _split_statistics(
    corpus: Corpus, split: str, sequence_length: int | None, max_exact: int
) -> SplitStatistics:
    """Return the statistics of a split, without samples."""
    documents, tokens, text_bytes = corpus.manifest.totals(split)
    entries = corpus.manifest.of(split)
    lengths = sampled_lengths(corpus.shards(split), max_exact)
    statistics: SplitStatistics = {
        "shards": len(entries),
        "documents": documents,
        "tokens": tokens,
        "text_bytes": text_bytes,
        "bytes_per_token": text_bytes / tokens,
        "replies": sum(entry.replies for entry in entries),
        "lengths": {
            "documents_read": len(lengths),
            "mean": tokens / documents,
            "median": _quantile(lengths, 50),
            "p90": _quantile(lengths, 90),
            "p99": _quantile(lengths, 99),
            "max": int(lengths.max()),
            "histogram": _histogram(lengths),
        },
    }
    if sequence_length is not None:
        statistics["windows"] = _window_statistics(entries, tokens, sequence_length)
    return statistics


def _quantile(lengths: I32, percent: int) -> int:
    """Return the smallest length that `percent` of the documents do not exceed."""
    return int(np.percentile(lengths, percent, method="inverted_cdf"))


def _histogram(lengths: I32) -> list[HistogramBar]:
    """Count lengths between powers of two: 1, 2 to 3, 4 to 7, ..., beginning with the shortest."""
    counts = np.bincount(np.floor(np.log2(lengths)).astype(np.int64))
    first = int(np.argmax(counts > 0))
    bars: list[HistogramBar] = []
    for power in range(first, len(counts)):
        bars.append({"from": 2**power, "to": 2 ** (power + 1) - 1, "documents": int(counts[power])})
    return bars


def _window_statistics(
    entries: list[ShardEntry], tokens: int, sequence_length: int
) -> WindowStatistics:
    # Windows do not cross shards.
    tail = sum(entry.tokens % sequence_length for entry in entries)
    return {
        "sequence_length": sequence_length,
        "windows": sum(entry.tokens // sequence_length for entry in entries),
        "tail_tokens": tail,
        "tail_share": tail / tokens,
    }


def sampled_lengths(shards: list[ShardReader], max_exact: int) -> I32:
    """Return the lengths of all documents, or of about `max_exact` in evenly spaced blocks
    [documents read].
    """
    first_documents = np.cumsum([0, *(shard.num_documents for shard in shards)])
    total = int(first_documents[-1])
    if total <= max_exact:
        return np.concatenate([shard.lengths[:] for shard in shards])
    blocks = []
    num_blocks = max(1, max_exact // _BLOCK)
    for number in range(num_blocks):
        # The documents are divided into `num_blocks` equal stretches, and a block is the middle of
        # a stretch: two blocks of 100 documents are around documents 25 and 75.
        start = (2 * number + 1) * total // (2 * num_blocks) - _BLOCK // 2
        # A block does not go beyond its shard, so it may be shorter.
        i = int(np.searchsorted(first_documents, start, side="right")) - 1
        begin = start - first_documents[i]
        blocks.append(shards[i].lengths[begin : begin + _BLOCK])
    return np.concatenate(blocks)


def _samples(shards: list[ShardReader], count: int, tokenizer: Tokenizer) -> list[DocumentSample]:
    """Return the beginnings of `count` evenly spaced documents."""
    total = sum(shard.num_documents for shard in shards)
    numbers = np.linspace(0, total - 1, num=min(count, total)).astype(np.int64).tolist()
    return [
        {"document": number, "start": tokenizer.decode(_first_tokens(shards, number))}
        for number in numbers
    ]


def _first_tokens(shards: list[ShardReader], number: int) -> I64:
    """Return the first tokens of a document, counted over all shards."""
    for shard in shards:
        if number < shard.num_documents:
            start = shard.document_start(number)
            length = min(int(shard.lengths[number]), _SHOWN_TOKENS)
            return shard.tokens(start, start + length)
        number -= shard.num_documents
    raise IndexError(number)

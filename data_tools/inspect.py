"""`llada data inspect`: what a prepared corpus holds, as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.prepare import summary
from llada.data.shards import Corpus
from llada.tokenizer import Tokenizer

_BAR = 40


def describe(folder: str | Path, samples: int = 3) -> str:
    """Totals, histogram of document lengths, and the start of a few documents. Raises UserError for an unsound folder."""
    corpus = Corpus.open(folder)
    manifest = corpus.manifest
    tokenizer = Tokenizer.load(corpus.tokenizer_folder)
    lines = [
        f"{corpus.folder}: format {manifest.format_version}, {manifest.dtype}, {len(manifest.sources):,} source files",
        f"tokenizer: {manifest.vocab_size:,} ids, {manifest.rows:,} rows, mask {manifest.mask_id}, EOS {manifest.eos_id}",
        summary(manifest),
    ]
    for split in ("train", "validation"):
        shards = corpus.shards(split)
        lengths = [np.asarray(shard.lengths) for shard in shards]
        if lengths:
            lines += [f"{split}: tokens per document", *_histogram(np.concatenate(lengths))]
    for shard in corpus.shards("train")[:1]:
        starts = np.asarray(shard.pointers) // shard.dtype.itemsize
        for i in np.linspace(0, len(starts) - 1, num=min(samples, len(starts)), dtype=int):
            text = tokenizer.decode(shard.tokens(int(starts[i]), int(starts[i]) + 40))
            lines.append(f"document {i}: {text!r}")
    return "\n".join(lines)


def _histogram(lengths: np.ndarray) -> list[str]:
    """Counts per power of two, with bars."""
    bins = np.floor(np.log2(lengths)).astype(int)
    counts = np.bincount(bins)
    first = int(bins.min())
    return [
        f"  {2**b:>9,} to {2 ** (b + 1) - 1:<9,} {count:>9,} {'#' * max(int(count > 0), round(_BAR * count / counts.max()))}"
        for b, count in enumerate(counts)
        if b >= first
    ]

"""What a prepared corpus holds, as text, and whether it is sound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.prepare import SPLITS, summary
from llada.data.corpus import Corpus, Manifest, problems
from llada.data.shards import Shard
from llada.errors import UserError
from llada.tokenizer import Tokenizer

_BAR = 40
_SHOWN_TOKENS = 40
_CHUNK = 1 << 22


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
    for split in SPLITS:
        shards = corpus.shards(split)
        if not shards:
            continue
        lines += ["", f"{split}: documents by length in tokens, EOS counted", *_histogram(shards)]
        total = sum(shard.num_documents for shard in shards)
        for number in np.linspace(0, total - 1, num=min(samples, total)).astype(np.int64).tolist():
            lines.append(f"{split} document {number}: {tokenizer.decode(_start_of(shards, number))!r}")
    return "\n".join(lines)


def check(folder: str | Path) -> list[str]:
    """Everything that is wrong with a prepared corpus, its copy of the tokenizer included; empty when it is sound."""
    found = problems(folder)
    try:
        manifest = Manifest.load(folder)
    except UserError:
        return found  # it says so
    try:
        tokenizer = Tokenizer.load(Path(folder) / "tokenizer")
    except UserError as error:
        return [*found, str(error)]
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        found.append(f"{Path(folder) / 'tokenizer'}: not the tokenizer of this corpus, its fingerprint differs from the manifest's")
    return found


def _start_of(shards: list[Shard], number: int) -> npt.NDArray[np.int64]:
    """The first tokens of a document, counted over all shards."""
    for shard in shards:
        if number < shard.num_documents:
            start = int(shard.pointers[number]) // shard.dtype.itemsize
            return shard.tokens(start, start + min(int(shard.lengths[number]), _SHOWN_TOKENS))
        number -= shard.num_documents
    raise IndexError(number)


def _lengths(shards: list[Shard]) -> Iterator[npt.NDArray[np.int32]]:
    for shard in shards:
        for first in range(0, shard.num_documents, _CHUNK):
            yield shard.lengths[first : first + _CHUNK]


def _histogram(shards: list[Shard]) -> list[str]:
    """Counts per power of two, with bars."""
    counts = np.zeros(32, dtype=np.int64)
    for lengths in _lengths(shards):
        counts += np.bincount(np.floor(np.log2(lengths)).astype(np.int64), minlength=32)
    used = np.flatnonzero(counts)
    return [
        f"  {2**b:>9,} to {2 ** (b + 1) - 1:<9,} {counts[b]:>11,} {'#' * max(int(counts[b] > 0), round(_BAR * counts[b] / counts.max()))}"
        for b in range(int(used[0]), int(used[-1]) + 1)
    ]

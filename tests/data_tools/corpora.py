"""Prepared corpora for tests, written from token ids, and what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.tools.corpus_statistics import corpus_statistics
from data_tools.tools.statistics_report import format_statistics
from llada.data.corpus import Corpus
from llada.data.manifest import FORMAT_VERSION, SPLITS, TEXT, Manifest
from llada.data.shard_format import token_dtype
from llada.data.shard_writer import ShardWriter
from llada.tokenizer import Tokenizer

Ids = list[list[int]]


def write_corpus(
    folder: Path,
    tokenizer: Tokenizer,
    train: Sequence[Ids],
    validation: Sequence[Ids] = (),
    **changes: object,
) -> Path:
    """A corpus of the documents (without EOS) of each shard, written with the plain
    shard writer.
    """
    folder.mkdir(parents=True)
    entries = []
    for split, shards in zip(SPLITS, (train, validation), strict=True):
        for number, documents in enumerate(shards):
            with ShardWriter(
                folder, f"{split}-{number:05d}", token_dtype(tokenizer.padded_vocab_size), split
            ) as writer:
                flat = [i for ids in documents for i in [*ids, tokenizer.eos_id]]
                text_bytes = sum(len(tokenizer.decode(ids).encode()) for ids in documents)
                writer.append(np.array(flat), [len(ids) + 1 for ids in documents], text_bytes)
                entries.append(writer.close())
    tokenizer.save(folder / "tokenizer")
    fields = {
        "format_version": FORMAT_VERSION,
        "tool_version": "0",
        "kind": TEXT,
        "dtype": token_dtype(tokenizer.padded_vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "padded_vocab_size": tokenizer.padded_vocab_size,
        "mask_id": tokenizer.mask_id,
        "eos_id": tokenizer.eos_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "options": {"validation_fraction": 0.1, "shard_tokens": 12},
        "sources": [{"path": f"{folder.name}.txt", "bytes": 10, "documents": 2}],
        "skipped": {"empty documents": 2},
        "shards": entries,
    }
    Manifest(**{**fields, **changes}).save(folder)
    return folder


def documents_of(folder: Path, split: str) -> list[list[int]]:
    """Every document of a split, EOS included, as the index alone says."""
    documents = []
    for shard in Corpus.open(folder).shards(split):
        ends = np.cumsum(shard.lengths.astype(np.int64))
        documents += [
            part.tolist() for part in np.split(shard.tokens(0, shard.num_tokens), ends[:-1])
        ]
    return documents


def inspection(folder: str | Path, samples: int = 3, sequence_length: int | None = None) -> str:
    """What `llada data inspect` prints."""
    corpus = Corpus.open(folder)
    return format_statistics(corpus_statistics(corpus, samples, sequence_length), corpus)


def shard_files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".bin", ".idx", ".replies")
    }

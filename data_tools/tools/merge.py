"""`llada data merge`: make one prepared corpus of several, document by document, without
tokenizing again.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llada
from data_tools.defaults import SHARD_TOKENS
from data_tools.job.progress import progress_bar
from data_tools.tools.copying import DocumentCopier
from data_tools.tools.identity import MERGED, identities, may_overlap
from llada.data.corpus import Corpus
from llada.data.manifest import CORPUS_FILES, SPLITS, Manifest, ShardEntry
from llada.data.shard_format import token_dtype
from llada.data.shard_writer import SplitWriter
from llada.errors import UserError
from llada.outputs import new_folder, refuse_inside


def merge(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    force: bool = False,
    progress: bool = False,
) -> Manifest:
    """Merge corpora: each split has their documents, in the order of the corpora, in new shards.

    Args:
        folders: prepared corpora of one tokenizer and kind.
        output: folder to make.
        shard_tokens: number of tokens with which a shard is full; its last document may exceed it.
        force: whether to replace a prepared corpus at `output`.
        progress: whether to show a bar on stderr.

    Raises:
        UserError: fewer than two corpora, a damaged corpus, different tokenizers or kinds, the same
            data twice; nothing is left behind.
        RunError: the output cannot be written; nothing is left behind.
    """
    if len(folders) < 2:
        raise UserError("merge: give two folders or more")
    corpora = [Corpus.open(folder) for folder in folders]
    _check_mergeable(corpora)
    for corpus in corpora:
        refuse_inside(output, corpus.folder, "--output")
    # Under a temporary name until everything is written.
    with new_folder(output, force, "a prepared corpus", CORPUS_FILES) as folder:
        entries = _copy_shards(corpora, folder, shard_tokens, progress)
        # All corpora have the same tokenizer.
        shutil.copytree(corpora[0].tokenizer_folder, folder / "tokenizer")
        merged = _merged_manifest(corpora, shard_tokens, entries)
        merged.save(folder)
    return merged


def _check_mergeable(corpora: list[Corpus]) -> None:
    """Raise UserError unless the corpora have one tokenizer and kind, and no document in common."""
    first = corpora[0]
    seen: list[tuple[str, Path]] = []  # identity of data, and the corpus that contains it
    for corpus in corpora:
        fingerprints = (
            first.manifest.tokenizer_fingerprint,
            corpus.manifest.tokenizer_fingerprint,
        )
        _check_equal("tokenizers", fingerprints, first, corpus)
        _check_equal("kinds", (first.manifest.kind, corpus.manifest.kind), first, corpus)
        own_identities = identities(corpus.manifest)
        for own in own_identities:
            for other, folder in seen:
                if may_overlap(own, other):
                    raise UserError(
                        f"merge: {folder} and {corpus.folder} contain the same data; its documents"
                        " would be included twice"
                    )
        seen += [(own, corpus.folder) for own in own_identities]


def _check_equal(name: str, values: tuple[str, str], first: Corpus, other: Corpus) -> None:
    if values[0] != values[1]:
        raise UserError(
            f"merge: {first.folder} and {other.folder} are of different {name}"
            f" ({values[0]} and {values[1]}); only corpora of one tokenizer and kind can be merged"
        )


def _copy_shards(
    corpora: list[Corpus], folder: Path, shard_tokens: int, progress: bool
) -> list[ShardEntry]:
    """Write the shards of all splits into `folder`."""
    copiers = [DocumentCopier(corpus) for corpus in corpora]
    dtype = token_dtype(corpora[0].manifest.padded_vocab_size)
    num_tokens = sum(entry.tokens for corpus in corpora for entry in corpus.manifest.shards)
    entries: list[ShardEntry] = []
    with progress_bar(progress, "merging", num_tokens) as advance:
        for split in SPLITS:
            with SplitWriter(folder, split, dtype, shard_tokens) as writer:
                for copier in copiers:
                    for entry in copier.corpus.manifest.of(split):
                        copier.copy(entry, 0, entry.documents, writer, advance)
                entries += writer.finish()
    return entries


def _merged_manifest(
    corpora: list[Corpus], shard_tokens: int, entries: list[ShardEntry]
) -> Manifest:
    manifests = [corpus.manifest for corpus in corpora]
    # The merged corpus has the options on which all agree, and keeps those of each corpus as well.
    fractions = [manifest.options.get("validation_fraction", 0.0) for manifest in manifests]
    options = {
        **_shared_options(manifests),
        "validation_fraction": max(fractions),
        "shard_tokens": shard_tokens,
        MERGED: [
            {
                "path": str(corpus.folder),
                "data": identities(corpus.manifest),
                "options": corpus.manifest.options,
            }
            for corpus in corpora
        ],
    }
    return replace(
        manifests[0],
        tool_version=llada.__version__,
        options=options,
        sources=_unique_sources(manifests),
        shards=entries,
        plan="",
        skipped=_added_up([manifest.skipped for manifest in manifests]),
        noted=_added_up([manifest.noted for manifest in manifests]),
        encoders=_added_up([manifest.encoders for manifest in manifests]),
    )


def _shared_options(manifests: list[Manifest]) -> dict[str, Any]:
    """Return the options that have the same value in all manifests."""
    missing = object()  # equal to no value, not even to None
    shared = {}
    for name, value in manifests[0].options.items():
        if all(manifest.options.get(name, missing) == value for manifest in manifests):
            shared[name] = value
    return shared


def _unique_sources(manifests: list[Manifest]) -> list[dict[str, Any]]:
    """Return the source files of all corpora, each once: parts of a corpus list the same files."""
    unique = {}
    for manifest in manifests:
        for source in manifest.sources:
            key = (source["path"], source["bytes"], source["documents"])
            unique[key] = source
    return list(unique.values())


def _added_up(counts: list[dict[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for count in counts:
        total += Counter(count)
    return dict(sorted(total.items()))

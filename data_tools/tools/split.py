"""`llada data split`: split a prepared corpus into parts, document by document, without tokenizing
again.
"""

from __future__ import annotations

import bisect
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

import llada
from data_tools.defaults import SHARD_TOKENS
from data_tools.job.progress import progress_bar
from data_tools.tools.copying import DocumentCopier
from data_tools.tools.identity import MERGED, PART_OF, part_identity
from llada.data.corpus import Corpus
from llada.data.manifest import SPLITS, TRAIN, Manifest, ShardEntry
from llada.data.shard_format import token_dtype
from llada.data.shard_writer import SplitWriter
from llada.errors import UserError
from llada.outputs import new_folder, refuse_inside


def split(
    folder: str | Path,
    parts: int,
    output: str | Path,
    *,
    force: bool = False,
    progress: bool = False,
) -> list[Manifest]:
    """Split a corpus into parts of about equal numbers of tokens: output/part-00000, ...

    A part is a run of neighboring documents of each split, so merging the parts in order restores
    the order of the documents. Shards are as large as those of the corpus.

    Args:
        folder: folder of a prepared corpus.
        parts: number of parts, at most the number of training documents.
        output: folder to make.
        force: whether to replace parts at `output`.
        progress: whether to show a bar on stderr.

    Raises:
        UserError: a damaged corpus, more parts than training documents; nothing is left behind.
        RunError: the output cannot be written; nothing is left behind.
    """
    corpus = Corpus.open(folder)
    manifest = corpus.manifest
    num_documents = manifest.totals(TRAIN)[0]
    if not 1 <= parts <= num_documents:
        raise UserError(
            f"--parts: {parts} is not in 1..{num_documents}, the training documents of {folder}"
        )
    refuse_inside(output, corpus.folder, "--output")
    names = [f"part-{number:05d}" for number in range(parts)]
    # Every part gets a training document. There may be fewer validation documents than parts.
    bounds = {
        name: _part_bounds(corpus, name, parts, at_least=int(name == TRAIN)) for name in SPLITS
    }
    manifests: list[Manifest] = []
    with new_folder(output, force, "a split corpus", (names[0], "part-*")) as folder_of_parts:
        copier = DocumentCopier(corpus)
        num_tokens = sum(entry.tokens for entry in manifest.shards)
        with progress_bar(progress, "splitting", num_tokens) as advance:
            for number, name in enumerate(names):
                part_folder = folder_of_parts / name
                part_folder.mkdir()
                entries: list[ShardEntry] = []
                for split_name, bound in bounds.items():
                    documents = range(bound[number], bound[number + 1])
                    entries += _write_part(copier, split_name, documents, part_folder, advance)
                shutil.copytree(corpus.tokenizer_folder, part_folder / "tokenizer")
                manifests.append(_part_manifest(manifest, number, parts, entries))
                manifests[-1].save(part_folder)
    return manifests


def _part_bounds(corpus: Corpus, split_name: str, parts: int, at_least: int) -> list[int]:
    """Return where parts of a split begin and end: part k is documents bounds[k]..bounds[k+1]-1.

    A part begins with the first document that starts at or after the part's share of the tokens. Of
    two parts of documents of 4, 1, 3 and 2 tokens, the second begins at token 5 of 10, where
    document 2 starts, so the bounds are [0, 2, 4].

    Args:
        corpus: corpus to split.
        split_name: train or validation.
        parts: number of parts.
        at_least: fewest documents of a part, even if a single document is longer than its share.

    Returns:
        Numbers of documents, counted over all shards of the split [parts + 1].
    """
    entries = corpus.manifest.of(split_name)
    shards = corpus.shards(split_name)
    documents, tokens, _ = corpus.manifest.totals(split_name)
    first_document = np.cumsum([0, *(entry.documents for entry in entries)])
    first_token = np.cumsum([0, *(entry.tokens for entry in entries)])
    bounds = [0]
    for part in range(1, parts):
        target = part * tokens // parts
        i = int(np.searchsorted(first_token, target, side="right")) - 1  # the shard of `target`
        begin = documents
        if i < len(shards):
            shard = shards[i]
            offset = (target - int(first_token[i])) * shard.dtype.itemsize
            begin = int(first_document[i]) + bisect.bisect_left(shard.pointers, offset)
        # Leave enough documents for the parts before and after this bound.
        earliest = bounds[-1] + at_least
        latest = documents - at_least * (parts - part)
        bounds.append(min(max(begin, earliest), latest))
    return [*bounds, documents]


def _write_part(
    copier: DocumentCopier,
    split_name: str,
    documents: range,
    folder: Path,
    advance: Callable[[int], None],
) -> list[ShardEntry]:
    """Write documents of a split, counted over all its shards, as the shards of a part."""
    manifest = copier.corpus.manifest
    dtype = token_dtype(manifest.padded_vocab_size)
    shard_tokens = manifest.options.get("shard_tokens", SHARD_TOKENS)
    first = 0  # first document of the shard, counted over all shards
    with SplitWriter(folder, split_name, dtype, shard_tokens) as writer:
        for entry in manifest.of(split_name):
            low = max(documents.start - first, 0)
            high = min(documents.stop - first, entry.documents)
            if low < high:
                copier.copy(entry, low, high, writer, advance)
            first += entry.documents
        return writer.finish()


def _part_manifest(whole: Manifest, number: int, parts: int, entries: list[ShardEntry]) -> Manifest:
    options = {name: value for name, value in whole.options.items() if name != MERGED}
    options[PART_OF] = part_identity(whole, number, parts)
    part = replace(whole, tool_version=llada.__version__, options=options, plan="", shards=entries)
    if number == 0:
        return part
    # Only the first part gets the counts, so that merging the parts gives those of the whole.
    return replace(part, skipped={}, noted={}, encoders={})

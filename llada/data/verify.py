"""The full check of a prepared corpus: checksums, indices, token ids and replies."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llada.arrays import I64
from llada.data.corpus import Corpus
from llada.data.manifest import CONVERSATIONS, Manifest, ShardEntry
from llada.data.shard_format import CHUNK, prompt_tokens
from llada.data.shard_reader import ShardReader, map_shard_file
from llada.errors import UserError

Flags = npt.NDArray[np.bool_]


def verify_corpus(
    folder: str | Path,
    hashes: bool = True,
    workers: int = 1,
    progress: Callable[[ShardEntry], object] = lambda _: None,
) -> list[str]:
    """Return everything that is wrong with a prepared corpus, one line each.

    Args:
        folder: folder of the corpus.
        hashes: whether to compare checksums too; otherwise only contradictions are noticed.
        workers: number of threads, each of which checks one shard at a time.
        progress: called with the entry of each shard when it is done.

    Returns:
        The problems in the order of the shards; empty if there are none.
    """
    try:
        corpus = Corpus(Path(folder), Manifest.load(folder))
    except UserError as error:
        return [str(error)]

    def check(entry: ShardEntry) -> list[str]:
        problems = _shard_problems(corpus, entry, hashes)
        progress(entry)
        return problems

    # Threads are enough: hashing and numpy release the interpreter's lock.
    problems: list[str] = []
    with ThreadPoolExecutor(workers) as threads:
        for shard_problems in threads.map(check, corpus.manifest.shards):
            problems += shard_problems
    return problems


def _shard_problems(corpus: Corpus, entry: ShardEntry, hashes: bool) -> list[str]:
    """Return the problems of a shard's files, then those of their content."""
    problems: list[str] = []
    for file in corpus.files_of(entry):
        try:
            file.check_size()
            if hashes:
                file.check_hash()
        except UserError as error:
            problems.append(str(error))
    files_are_sound = not problems
    try:
        shard = corpus.shard(entry)
    except UserError as error:
        # Where a file is damaged, this error would only repeat it.
        return problems or [str(error)]
    # Token ids are located through the index, so they are checked only if it is sound.
    problems += _index_problems(shard) or _token_problems(shard, corpus.manifest, entry)
    if corpus.manifest.kind == CONVERSATIONS and files_are_sound:
        replies_path = corpus.folder / f"{entry.name}.replies"
        problems += _reply_problems(shard, corpus.replies(entry), replies_path)
    return problems


def _index_problems(shard: ShardReader) -> list[str]:
    """Check that the documents tile the token file in order."""
    expected = 0
    for first in range(0, shard.num_documents, CHUNK):
        lengths = shard.lengths[first : first + CHUNK].astype(np.int64)
        pointers = shard.pointers[first : first + CHUNK].astype(np.int64)
        indices = shard.indices[first : first + len(lengths)].astype(np.int64)
        ends = expected + np.cumsum(lengths) * shard.dtype.itemsize
        starts = np.concatenate([[expected], ends[:-1]])
        wrong = (lengths < 1) | (pointers != starts) | (indices != first + np.arange(len(indices)))
        if wrong.any():
            return [
                f"{shard.idx_path}: document {first + int(np.argmax(wrong))} does not start where"
                " the one before it ends"
            ]
        expected = int(ends[-1])
    last = int(shard.indices[-1])
    if last != shard.num_documents:
        return [f"{shard.idx_path}: the last document index is {last}, not {shard.num_documents}"]
    return []


def _reply_problems(shard: ShardReader, replies: I64, path: Path) -> list[str]:
    """Check that every document has replies, in order, whose offsets lie inside it.

    The index must be sound.
    """
    owner, history_end, turn_start, response_start, turn_end = replies.T
    in_order = (
        len(owner) > 0
        and (np.diff(owner, prepend=0) >= 0).all()
        and (np.unique(owner) == np.arange(shard.num_documents)).all()
    )
    if not in_order:
        return [
            f"{path}: its replies are not those of documents 0..{shard.num_documents - 1} in order"
        ]
    document_lengths = shard.lengths[owner]
    offsets_ascend = (
        (history_end >= 0)
        & (history_end <= turn_start)
        & (turn_start <= response_start)
        & (response_start < turn_end)
    )
    wrong = ~(offsets_ascend & (prompt_tokens(replies) > 0) & (turn_end <= document_lengths))
    if wrong.any():
        return [f"{path}: reply {int(np.argmax(wrong))} does not lie inside its document"]
    return []


class _Tally:
    """Counts the occurrences of one problem in a shard, and remembers the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first = -1

    def add(self, wrong: Flags, offset: int) -> None:
        """Count the flags that are set; the first of them has number `offset`."""
        if not wrong.any():
            return
        if not self.count:
            self.first = offset + int(np.argmax(wrong))
        self.count += int(wrong.sum())


def _token_problems(shard: ShardReader, manifest: Manifest, entry: ShardEntry) -> list[str]:
    """Check for ids outside the vocabulary, mask tokens, and documents that do not end with EOS.

    The index must be sound.
    """
    unknown = _Tally()
    masks = _Tally()
    unended = _Tally()
    highest = 0
    for start in range(0, shard.num_tokens, CHUNK):
        tokens = shard.tokens(start, min(start + CHUNK, shard.num_tokens))
        highest = max(highest, int(tokens.max()))
        unknown.add((tokens < 0) | (tokens >= manifest.vocab_size), start)
        masks.add(tokens == manifest.mask_id, start)
    # The last tokens of documents may be few among many, so they are mapped, not read.
    stored = map_shard_file(shard.bin_path, shard.dtype)
    for first in range(0, shard.num_documents, CHUNK):
        lengths = shard.lengths[first : first + CHUNK].astype(np.int64)
        starts = shard.pointers[first : first + CHUNK].astype(np.int64) // shard.dtype.itemsize
        unended.add(stored[starts + lengths - 1] != manifest.eos_id, first)

    problems = []
    if unknown.count:
        problems.append(
            f"{shard.bin_path}: {unknown.count} ids are not in 0..{manifest.vocab_size - 1}, the"
            f" first at token {unknown.first}"
        )
    if masks.count:
        problems.append(
            f"{shard.bin_path}: {masks.count} ids are the mask token {manifest.mask_id}, the first"
            f" at token {masks.first}"
        )
    if unended.count:
        problems.append(
            f"{shard.bin_path}: {unended.count} documents do not end with EOS {manifest.eos_id},"
            f" the first is document {unended.first}"
        )
    if highest != entry.max_token_id:
        problems.append(
            f"{shard.bin_path}: the highest id is {highest}, the manifest says {entry.max_token_id}"
        )
    return problems

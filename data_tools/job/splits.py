"""Encoded documents into the shards of their splits."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from llada.data.corpus import TRAIN, VALIDATION
from llada.data.shards import I64, Shard, ShardEntry, SplitWriter
from llada.errors import UserError
from llada.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """Documents as token ids.

    Attributes:
        flat: the ids of all documents one after the other, each with its EOS, int64.
        lengths: ids of each document, int64 [n].
        text_bytes: UTF-8 bytes of each document's text, int64 [n].
        hashes: 64-bit hash of each document, which decides whether it is held out [n].
        replies: of conversations, rows of REPLY_FIELDS in order of their documents, int64 [replies,
            5].
    """

    flat: I64
    lengths: I64
    text_bytes: I64
    hashes: Sequence[int]
    replies: I64 | None = None


def is_held_out(key: bytes, fraction: float) -> bool:
    """Return whether a document belongs to the validation split.

    The hash depends on the document alone: it stays in its split when inputs are added, reordered
    or shared out differently, and equal documents are in the same split.

    Args:
        key: bytes that identify the document; for text, its UTF-8.
        fraction: share of the documents that is held out, in [0, 1).
    """
    return _is_held_out_hash(xxhash.xxh3_64_intdigest(key), fraction)


def _is_held_out_hash(value: int, fraction: float) -> bool:
    return value / 2**64 < fraction


def write_batch(
    batch: Encoded, tokenizer: Tokenizer, writers: dict[str, SplitWriter], fraction: float
) -> None:
    """Append every document to the split that its hash names. Raises UserError for an id that no
    text may have.
    """
    flat = batch.flat
    if flat.size and (
        flat.min() < 0 or flat.max() >= tokenizer.vocab_size or (flat == tokenizer.mask_id).any()
    ):
        token_id = int(
            flat[
                np.argmax((flat < 0) | (flat >= tokenizer.vocab_size) | (flat == tokenizer.mask_id))
            ]
        )
        raise UserError(
            f"--tokenizer: {tokenizer.name} gave id {token_id} for text; allowed are"
            f" 0..{tokenizer.vocab_size - 1} without the mask token {tokenizer.mask_id}"
        )
    held_out = np.array([_is_held_out_hash(value, fraction) for value in batch.hashes])
    if not held_out.any():
        writers[TRAIN].append(flat, batch.lengths, batch.text_bytes, batch.replies)
        return
    owner = np.repeat(held_out, batch.lengths)
    for split, chosen, ids in (
        (TRAIN, ~held_out, flat[~owner]),
        (VALIDATION, held_out, flat[owner]),
    ):
        if chosen.any():
            replies = batch.replies
            if replies is not None:
                replies = replies[chosen[replies[:, 0]]]
                replies[:, 0] = (np.cumsum(chosen) - 1)[replies[:, 0]]
            writers[split].append(ids, batch.lengths[chosen], batch.text_bytes[chosen], replies)


def append_shard(writer: SplitWriter, shard: Shard, entry: ShardEntry, replies: I64 | None) -> None:
    """Append all documents of a shard, some at a time. The bytes of its text, known as a sum only,
    go to its first document.
    """
    for first, flat, lengths in shard.runs():
        own = None if replies is None else replies_of(replies, first, first + len(lengths))
        sizes = np.zeros(len(lengths), dtype=np.int64)
        sizes[0] = 0 if first else entry.text_bytes
        writer.append(flat, lengths, sizes, own)


def replies_of(replies: I64, first: int, stop: int) -> I64:
    """Return the rows of documents first..stop-1, the document counted from `first`.

    Args:
        replies: rows of REPLY_FIELDS sorted by document; may be memory-mapped.
        first, stop: documents.
    """
    documents = replies[:, 0]
    # bisect reads a few rows; np.searchsorted would copy the column, which is not contiguous.
    start_row = bisect.bisect_left(documents, first)
    stop_row = bisect.bisect_left(documents, stop)
    return replies[start_row:stop_row] - np.array([first, 0, 0, 0, 0])

"""Encoded documents into the shards of their splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.replies import select_replies
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


def is_held_out(document_hash: int, validation_fraction: float) -> bool:
    """Return whether a document belongs to the validation split.

    Hashes are uniform in [0, 2^64), so about `validation_fraction` of them are below that share of
    the range. The rule depends on the document alone: the same text lands on the same side of
    every corpus with this fraction.
    """
    return document_hash / 2**64 < validation_fraction


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
    held_out = np.array([is_held_out(value, fraction) for value in batch.hashes])
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
        own = None if replies is None else select_replies(replies, first, first + len(lengths))
        sizes = np.zeros(len(lengths), dtype=np.int64)
        sizes[0] = 0 if first else entry.text_bytes
        writer.append(flat, lengths, sizes, own)

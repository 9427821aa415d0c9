"""The train and validation splits: which documents are held out, and the shards they go to."""

from __future__ import annotations

import bisect

import numpy as np
import numpy.typing as npt
import xxhash

from data_tools.documents.base import EncodedDocuments
from llada.arrays import I64
from llada.data.manifest import TRAIN, VALIDATION, ShardEntry
from llada.data.shard_format import shift_documents
from llada.data.shard_reader import ShardReader
from llada.data.shard_writer import SplitWriter
from llada.errors import UserError
from llada.tokenizer import Tokenizer


def is_held_out(key: bytes, fraction: float) -> bool:
    """Return whether a document belongs to the validation split.

    The hash depends on the document alone. So a document stays in its split when inputs are added,
    reordered or divided differently, and equal documents are in the same split.

    Args:
        key: bytes that identify the document; for text, its UTF-8.
        fraction: share of the documents that is held out, in [0, 1).
    """
    return bool(xxhash.xxh3_64_intdigest(key) / 2**64 < fraction)


def write_batch(
    batch: EncodedDocuments,
    tokenizer: Tokenizer,
    writers: dict[str, SplitWriter],
    fraction: float,
) -> None:
    """Append every document of a batch to its split.

    Args:
        batch: documents in order.
        tokenizer: tokenizer of the corpus.
        writers: writer of each split.
        fraction: share of the documents that is held out.

    Raises:
        UserError: the encoder gave an id that no text may have.
    """
    _check_ids(batch.flat_tokens, tokenizer)
    held_out = np.array([is_held_out(key, fraction) for key in batch.split_keys], dtype=bool)
    if not held_out.any():
        # The usual case: with a small fraction, most batches hold nothing out. Nothing is copied.
        writers[TRAIN].append(batch.flat_tokens, batch.lengths, batch.text_bytes, batch.replies)
        return
    _append_selected(batch, ~held_out, writers[TRAIN])
    _append_selected(batch, held_out, writers[VALIDATION])


def _check_ids(flat: I64, tokenizer: Tokenizer) -> None:
    """Raise UserError for an id outside the vocabulary, and for the mask: no text is the mask."""
    if not flat.size:
        return
    # This test is cheaper than the array `wrong`, which is needed only to name a wrong id.
    in_range = flat.min() >= 0 and flat.max() < tokenizer.vocab_size
    if in_range and not (flat == tokenizer.mask_id).any():
        return
    wrong = (flat < 0) | (flat >= tokenizer.vocab_size) | (flat == tokenizer.mask_id)
    raise UserError(
        f"--tokenizer: {tokenizer.name} gave id {flat[np.argmax(wrong)]} for text; allowed are"
        f" 0..{tokenizer.vocab_size - 1} without the mask token {tokenizer.mask_id}"
    )


def _append_selected(
    batch: EncodedDocuments, selected: npt.NDArray[np.bool_], writer: SplitWriter
) -> None:
    """Append some documents of a batch, in order.

    Args:
        batch: documents in order.
        selected: which of them to append, bool [documents].
        writer: writer of their split.
    """
    if not selected.any():
        return
    replies = batch.replies
    if replies is not None:
        # Documents are numbered anew. With documents 1 and 3 of four selected, `new_number` is
        # [-1, 0, 0, 1]: rows of document 3 become rows of document 1.
        new_number = np.cumsum(selected) - 1
        replies = replies[selected[replies[:, 0]]]
        replies[:, 0] = new_number[replies[:, 0]]
    token_is_selected = np.repeat(selected, batch.lengths)
    writer.append(
        batch.flat_tokens[token_is_selected],
        batch.lengths[selected],
        batch.text_bytes[selected],
        replies,
    )


def append_shard(
    writer: SplitWriter, shard: ShardReader, entry: ShardEntry, replies: I64 | None
) -> None:
    """Append all documents of a shard in runs, so that memory is bounded.

    Args:
        writer: writer of the split.
        shard: reader of the shard.
        entry: the shard's entry.
        replies: reply table of the shard; None for text.
    """
    for first, flat, lengths in shard.runs():
        own_replies = None
        if replies is not None:
            own_replies = replies_of(replies, first, first + len(lengths))
        # Only the sum of the text bytes is known, so the first document gets all of it.
        text_bytes = np.zeros(len(lengths), dtype=np.int64)
        if first == 0:
            text_bytes[0] = entry.text_bytes
        writer.append(flat, lengths, text_bytes, own_replies)


def replies_of(replies: I64, first: int, stop: int) -> I64:
    """Return the replies of documents first..stop-1, with documents counted from `first`.

    Args:
        replies: rows of REPLY_FIELDS sorted by document; may be memory-mapped.
        first: first document.
        stop: document after the last one.
    """
    documents = replies[:, 0]
    # bisect reads a few rows; np.searchsorted would copy the column, which is not contiguous.
    start_row = bisect.bisect_left(documents, first)
    stop_row = bisect.bisect_left(documents, stop)
    return shift_documents(replies[start_row:stop_row], -first)

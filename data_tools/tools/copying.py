"""Copy documents of prepared corpora into new shards, without tokenizing again.

Merging and splitting share this. Only the bytes of text cannot simply be copied: a manifest
contains their sum over each shard, and the documents of a shard may go to several new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_tools.job.splits import replies_of
from llada.arrays import I64
from llada.data.corpus import Corpus
from llada.data.manifest import CONVERSATIONS, ShardEntry
from llada.data.shard_format import damaged
from llada.data.shard_reader import ShardReader
from llada.data.shard_writer import SplitWriter
from llada.tokenizer import Tokenizer


class _OpenShard(NamedTuple):
    """A shard whose files match their checksums.

    Attributes:
        name: name of the shard.
        reader: reader of the shard.
        replies: rows of REPLY_FIELDS, int64 [replies, 5]; None for a corpus of text.
        text_bytes: bytes of text of its documents.
    """

    name: str
    reader: ShardReader
    replies: I64 | None
    text_bytes: TextBytes


class DocumentCopier:
    """Copies documents out of a corpus.

    Every file is compared with its checksum before its first document is copied.

    Args:
        corpus: corpus to copy from.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._token_bytes = token_bytes(corpus.tokenizer())
        # Only the last shard stays open, because callers copy the shards in order.
        self._open_shard: _OpenShard | None = None

    def copy(
        self,
        entry: ShardEntry,
        first: int,
        stop: int,
        writer: SplitWriter,
        advance: Callable[[int], None],
    ) -> None:
        """Append documents first..stop-1 of a shard to a split.

        Args:
            entry: entry of the shard.
            first: first document.
            stop: document after the last one.
            writer: writer of the split.
            advance: called with the number of tokens copied since the last call.

        Raises:
            UserError: the shard is damaged.
        """
        opened = self._opened(entry)
        for begin, flat, lengths in opened.reader.runs(first, stop):
            replies = _replies_of_run(opened.replies, begin, lengths)
            text_bytes = opened.text_bytes.of_run(begin, flat, lengths, replies)
            writer.append(flat, lengths, text_bytes, replies)
            advance(len(flat))

    def _opened(self, entry: ShardEntry) -> _OpenShard:
        if self._open_shard is None or self._open_shard.name != entry.name:
            for file in self.corpus.files_of(entry):
                file.check_hash()
            reader = self.corpus.shard(entry)
            replies = None
            if self.corpus.manifest.kind == CONVERSATIONS:
                replies = self.corpus.replies(entry)
            text_bytes = TextBytes(self._token_bytes, reader, entry, replies)
            self._open_shard = _OpenShard(entry.name, reader, replies, text_bytes)
        return self._open_shard


def _replies_of_run(replies: I64 | None, first: int, lengths: I64) -> I64 | None:
    if replies is None:
        return None
    return replies_of(replies, first, first + len(lengths))


def token_bytes(tokenizer: Tokenizer) -> I64:
    """Return the UTF-8 bytes of the text of each id, int64 [vocab_size].

    They are 0 for special tokens, and exact for byte-level vocabularies.
    """
    sizes = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode([token_id], skip_special_tokens=True)
        if "\ufffd" in text:
            # Part of a character, which cannot be decoded. A byte-level vocabulary writes one
            # character per byte.
            sizes[token_id] = len(tokenizer.token(token_id))
        else:
            sizes[token_id] = len(text.encode())
    return sizes


class TextBytes:
    """The bytes of text of each document of a shard, of which the manifest contains only the sum.

    If the bytes of the tokens add up to this sum, as with byte-level tokenizers, those of each
    document are exact. Otherwise the tokenizer changes text, and the sum is divided in proportion
    to the tokens.

    Args:
        token_bytes: bytes of each id, from `token_bytes`.
        shard: reader of the shard.
        entry: entry of the shard.
        replies: rows of REPLY_FIELDS of the shard, if only the text of replies counts; None if all
            text does.

    Raises:
        UserError: an id is outside the vocabulary.
    """

    def __init__(
        self, token_bytes: I64, shard: ShardReader, entry: ShardEntry, replies: I64 | None
    ) -> None:
        self._token_bytes = token_bytes
        self._shard = shard
        self._entry = entry
        total = 0
        for first, flat, lengths in shard.runs():
            if flat.min() < 0 or flat.max() >= len(token_bytes):
                raise damaged(shard.bin_path, f"an id is not in 0..{len(token_bytes) - 1}")
            run_replies = _replies_of_run(replies, first, lengths)
            total += int(self._by_token(flat, lengths, run_replies).sum())
        self._is_exact = total == entry.text_bytes

    def of_run(self, first: int, flat: I64, lengths: I64, replies: I64 | None) -> I64:
        """Return the bytes of text of neighboring documents, int64 [documents].

        Args:
            first: first of the documents, counted in the shard.
            flat: ids of the documents, concatenated, int64 [tokens].
            lengths: tokens of each document, int64 [documents].
            replies: rows of REPLY_FIELDS, with documents counted from `first`; None if all text
                counts.
        """
        if self._is_exact:
            return self._by_token(flat, lengths, replies)
        # The ends of documents are scaled from tokens to bytes and rounded down, so that the shares
        # add up, whatever run is requested. With 10 bytes for documents of 1, 1 and 2 tokens, the
        # ends are at 2.5, 5 and 10, or rounded 2, 5 and 10, so the shares are 2, 3 and 5 bytes.
        start = int(self._shard.pointers[first]) // self._shard.dtype.itemsize
        ends = start + np.cumsum(np.concatenate([[0], lengths]))
        shares: I64 = np.floor(ends / self._entry.tokens * self._entry.text_bytes).astype(np.int64)
        return shares[1:] - shares[:-1]

    def _by_token(self, flat: I64, lengths: I64, replies: I64 | None) -> I64:
        """Add up the bytes of the tokens of each document, or of its replies."""
        bytes_before = np.concatenate([[0], np.cumsum(self._token_bytes[flat])])
        ends = np.cumsum(lengths)
        starts = ends - lengths
        if replies is None:
            return bytes_before[ends] - bytes_before[starts]
        document, _, _, response_start, turn_end = replies.T
        response_bytes = (
            bytes_before[starts[document] + turn_end]
            - bytes_before[starts[document] + response_start]
        )
        sizes = np.zeros(len(lengths), dtype=np.int64)
        # A document may have several replies. `sizes[document] += ...` would add only the last.
        np.add.at(sizes, document, response_bytes)
        return sizes

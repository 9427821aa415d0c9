"""The format of a shard: what its writer and its reader must agree on.

A shard of token ids is two files in Megatron's indexed dataset format, little-endian:

* NAME.bin contains the token ids, one document after the other. A document is its tokens and one
  EOS.
* NAME.idx contains the header (b"MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 sequences,
  u64 document indices = sequences + 1), then int32 lengths in tokens, int64 offsets in bytes, and
  int64 document indices. A sequence is one document.

A shard of conversations has a third file, NAME.replies: int64 rows of REPLY_FIELDS, sorted by
document.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llada.arrays import I64
from llada.errors import UserError

TokenDtype = np.dtype[np.int32 | np.uint16]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
"""Header of an index: MAGIC, VERSION, dtype code, sequences, document indices."""

# Megatron has more dtypes; token ids need only these.
DTYPES: dict[int, TokenDtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
"""Dtypes of token ids by Megatron's code."""

LENGTH_BYTES = 4
"""Bytes of a document's length in an index."""
POINTER_BYTES = 8
"""Bytes of a document's offset, and of a document index."""

REPLY_FIELDS = ("document", "history_end", "turn_start", "response_start", "turn_end")
"""Columns of the reply table: a reply's document in the shard, and offsets into that document's
tokens (llada.chat.format.Reply).
"""

CHUNK = 1 << 22
"""Tokens, documents or bytes handled at a time: bounds the memory of passes over a whole shard."""


def token_dtype(padded_vocab_size: int) -> TokenDtype:
    """Return the dtype of token ids: uint16 for vocabularies below 65500, else int32.

    This is Megatron's rule, so that its own tools would choose the same.
    """
    if padded_vocab_size < 65500:
        return DTYPES[8]
    return DTYPES[4]


class IndexParts(NamedTuple):
    """Where the parts of an index begin, in bytes from the start of its file.

    Attributes:
        lengths: tokens of every sequence, int32.
        pointers: offset of every sequence in the token file in bytes, int64.
        indices: document indices: the first sequence of every document, and the number of
            sequences, int64.
        end: size of the file.
    """

    lengths: int
    pointers: int
    indices: int
    end: int


def index_parts(num_sequences: int, num_indices: int) -> IndexParts:
    """Return the parts of an index.

    Args:
        num_sequences: number of sequences. A corpus of this project has one per document.
        num_indices: number of document indices, one more than there are documents.
    """
    lengths = HEADER.size
    pointers = lengths + LENGTH_BYTES * num_sequences
    indices = pointers + POINTER_BYTES * num_sequences
    return IndexParts(lengths, pointers, indices, indices + POINTER_BYTES * num_indices)


def shift_documents(replies: I64, by: int) -> I64:
    """Return rows of REPLY_FIELDS with `by` added to their documents."""
    shifted = replies.copy()
    shifted[:, 0] += by
    return shifted


def prompt_tokens(replies: I64) -> I64:
    """Return the number of prompt tokens of each row of REPLY_FIELDS.

    The prompt of a reply is the history, and the part of the reply's turn before its response.
    """
    _, history_end, turn_start, response_start, _ = replies.T
    return history_end + response_start - turn_start


def damaged(path: Path, why: str) -> UserError:
    """Return the error for a file whose content is not what was written."""
    return UserError(f"{path}: truncated or altered ({why}); prepare the corpus again")


def unreadable(path: Path, error: OSError) -> UserError:
    """Return the error for a file that is missing or cannot be read."""
    if isinstance(error, FileNotFoundError):
        return UserError(
            f"{path}: missing from the corpus {path.parent}; put it back, or prepare the corpus"
            " again"
        )
    return UserError(
        f"{path}: truncated or altered, cannot be read ({error.strerror}); prepare the corpus again"
    )


def size_of(path: Path) -> int:
    """Return the size of a file in bytes. Raises UserError when it cannot be read."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None

"""Decode the documents of a shard; export and import share it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llada.arrays import I64
from llada.tokenizer import Tokenizer


def decode_documents(tokenizer: Tokenizer, flat: I64, lengths: I64) -> Iterator[str]:
    """Yield the text of each document; special tokens, EOS among them, are not text.

    Args:
        tokenizer: tokenizer of the ids.
        flat: ids of all documents, concatenated, int64 [tokens].
        lengths: tokens of each document, int64 [documents].
    """
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        yield tokenizer.decode(flat[start:end].tolist(), skip_special_tokens=True)

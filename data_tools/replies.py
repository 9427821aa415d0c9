"""Rows that say where the replies of conversations lie (REPLY_FIELDS of `llada.data.shards`)."""

from __future__ import annotations

import bisect

import numpy as np

from llada.data.shards import I64


def select_replies(replies: I64, first: int, stop: int) -> I64:
    """Return the replies of documents first..stop-1, with documents counted from `first`.

    Args:
        replies: rows of REPLY_FIELDS sorted by document, int64 [replies, 5]. May be memory-mapped:
            only the rows that are returned are read.
        first: first document.
        stop: document after the last one.

    Returns:
        A copy, int64 [selected, 5].
    """
    documents = replies[:, 0]
    # bisect reads about log2(n) elements; np.searchsorted would copy a column that is not
    # contiguous.
    start = bisect.bisect_left(documents, first)
    end = bisect.bisect_left(documents, stop)
    return replies[start:end] - np.array([first, 0, 0, 0, 0])

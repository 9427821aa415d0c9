"""Passages of text, and a sample of them from all over the input to train a tokenizer on."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import xxhash

from llada.errors import UserError

PASSAGE_CHARACTERS = 4096
"""Characters of the longest passage."""


@dataclass(frozen=True)
class Sample:
    """A sample of texts.

    Attributes:
        passages: in the order of the input.
        text_bytes: UTF-8 bytes of all texts.
        kept_bytes: UTF-8 bytes of the passages.
    """

    passages: list[str]
    text_bytes: int
    kept_bytes: int


def sample_passages(texts: Iterable[str], limit: int) -> Sample:
    """Choose passages from all over the texts, no more than `limit` bytes of them.

    Each passage gets a hash, keyed by its number in the input, and those with the smallest hashes
    stay. That takes one pass, and memory for the sample alone. The same texts give the same sample,
    and equal passages do not all share one fate.

    Raises:
        UserError: a limit with no room for a single passage.
    """
    # (-hash, number, UTF-8): a heap has its smallest entry first, here the greatest hash.
    heap: list[tuple[int, int, bytes]] = []
    # Once a passage is dropped, none with a greater hash can come in: the sample stays that of the
    # smallest hashes, even where a short passage would still fit.
    limit_hash = 1 << 64
    text_bytes = 0
    kept_bytes = 0
    number = 0
    for text in texts:
        for passage in cut_passages(text):
            data = passage.encode()
            number += 1
            text_bytes += len(data)
            value = xxhash.xxh3_64_intdigest(data, seed=number)
            if value >= limit_hash:
                continue
            heapq.heappush(heap, (-value, number, data))
            kept_bytes += len(data)
            while kept_bytes > limit:
                negative_hash, _, dropped = heapq.heappop(heap)
                limit_hash = -negative_hash
                kept_bytes -= len(dropped)
    if text_bytes and not heap:
        raise UserError(
            f"--sample-bytes: {limit} is too little for a passage of the text; give some thousands"
            " at least"
        )
    heap.sort(key=lambda entry: entry[1])
    return Sample([data.decode() for _, _, data in heap], text_bytes, kept_bytes)


def cut_passages(text: str) -> Iterator[str]:
    """Cut a long text at ends of lines, or before spaces, or anywhere; a short one stays whole.

    The passages joined are the text.
    """
    start = 0
    while len(text) - start > PASSAGE_CHARACTERS:
        limit = start + PASSAGE_CHARACTERS
        end = text.rfind("\n", start, limit) + 1
        if end <= start:
            end = text.rfind(" ", start, limit)
        if end <= start:
            end = limit
        yield text[start:end]
        start = end
    yield text[start:]

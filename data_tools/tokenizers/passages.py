"""Passages of text, and a sample of the passages of the whole input to train a tokenizer on."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import xxhash

from llada.errors import UserError

PASSAGE_CHARACTERS = 4096
"""Characters of the longest passage."""


@dataclass(frozen=True)
class PassageSample:
    """A sample of the passages of all texts.

    Attributes:
        passages: passages of the sample, in the order of the input.
        text_bytes: UTF-8 bytes of all texts.
        kept_bytes: UTF-8 bytes of the passages.
    """

    passages: list[str]
    text_bytes: int
    kept_bytes: int


def sample_passages(texts: Iterable[str], limit: int) -> PassageSample:
    """Choose a sample of at most `limit` bytes from the passages of all texts.

    Each passage gets a hash, seeded with its number in the input, and the smallest hashes stay.
    This takes one pass, and memory for the sample alone. The same texts give the same sample, and
    equal passages are chosen independently.

    Raises:
        UserError: a limit with no room for a single passage.
    """
    # (-hash, number, UTF-8). The smallest entry of a heap comes first, here the greatest hash.
    heap: list[tuple[int, int, bytes]] = []
    # Once a passage is dropped, no greater hash is added, even if a short passage would still fit:
    # the sample always has the smallest hashes.
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
            f"--sample-bytes: {limit} is too small for one passage; use at least a few thousand"
        )
    heap.sort(key=lambda entry: entry[1])
    return PassageSample([data.decode() for _, _, data in heap], text_bytes, kept_bytes)


def cut_passages(text: str) -> Iterator[str]:
    """Cut a text into passages, at ends of lines if possible, else before spaces, else anywhere.

    The passages concatenated are the text.
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

"""Group documents into batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_batches(
    documents: Iterable[T], size_of: Callable[[T], int], limit: int
) -> Iterator[list[T]]:
    """Yield lists of documents; a batch ends with the document that brings its size to `limit`.

    So a batch exceeds `limit` by less than its last document. The final batch may be smaller.

    Args:
        documents: documents in order.
        size_of: returns the size of a document.
        limit: size with which a batch is full.
    """
    batch: list[T] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += size_of(document)
        if size >= limit:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch

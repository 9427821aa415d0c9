"""Group documents into batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_batches(
    documents: Iterable[T], size_of: Callable[[T], int], limit: int
) -> Iterator[list[T]]:
    """Yield lists of documents, each just large enough that its sizes add up to `limit`.

    A batch is larger than `limit` by less than its last document; the last batch may be smaller.
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

"""Documents some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_batches(
    documents: Iterable[T], size_of: Callable[[T], int], limit: int
) -> Iterator[list[T]]:
    """Group documents until their sizes add up to `limit`."""
    batch: list[T] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += size_of(document)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

"""Writing shards (llada/data/shard_format.py): one shard, or all shards of a split."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from llada.arrays import I64
from llada.data.manifest import ShardEntry
from llada.data.shard_format import CHUNK, DTYPES, HEADER, MAGIC, VERSION, shift_documents
from llada.files import sync_folder

_CODES: dict[np.dtype[np.generic], int] = {dtype: code for code, dtype in DTYPES.items()}


class _HashedFile:
    """A file that is written under a temporary name while its size and checksum are computed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # The temporary name is unique: two tasks that do the same unit of work may write the same
        # file at the same time.
        self.partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
        self.bytes = 0
        self._published = False
        self._hash = xxhash.xxh3_64()
        # `finish` or `discard` closes it.
        self._file: BinaryIO = open(self.partial, "wb")  # noqa: SIM115

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += memoryview(data).nbytes

    def finish(self) -> str:
        """Flush everything to the disk, still under the temporary name; return the checksum."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def publish(self) -> None:
        """Give the file its name."""
        os.replace(self.partial, self.path)
        self._published = True

    def discard(self) -> None:
        """Remove the file, whether it is published or not.

        If it is not, an older file of the same name stays.
        """
        self._file.close()
        self.partial.unlink(missing_ok=True)
        if self._published:
            self.path.unlink(missing_ok=True)


class ShardWriter:
    """Writes one shard.

    The files get their names when the writer closes; an exception before that leaves none behind.

    Args:
        folder: existing folder of the corpus.
        name: name of the shard, unique in the folder.
        dtype: dtype of the token ids, from `token_dtype`.
        split: split that the manifest's entry names.

    Attributes:
        tokens: number of tokens written so far.
        documents: number of documents written so far.
        replies: number of replies written so far.
    """

    def __init__(self, folder: str | Path, name: str, dtype: npt.DTypeLike, split: str) -> None:
        self.folder = Path(folder)
        self.name = name
        self.dtype = np.dtype(dtype)
        self.split = split
        if self.dtype not in _CODES:
            raise ValueError(
                f"token dtype {self.dtype} is not one of {', '.join(map(str, _CODES))}"
            )
        self.tokens = 0
        self.documents = 0
        self.replies = 0
        self._text_bytes = 0
        self._max_token_id = 0
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._entry: ShardEntry | None = None
        self._bin = _HashedFile(self.folder / f"{name}.bin")
        self._idx: _HashedFile | None = None
        self._replies: _HashedFile | None = None

    def append(
        self,
        flat_tokens: npt.ArrayLike,
        lengths: npt.ArrayLike,
        text_bytes: int,
        replies: I64 | None = None,
    ) -> None:
        """Add documents.

        Args:
            flat_tokens: token ids of the documents, concatenated, EOS included.
            lengths: tokens of each document, EOS included, all >= 1.
            text_bytes: UTF-8 bytes of the documents' text; of conversations, of their replies.
            replies: rows of REPLY_FIELDS, documents counted from the first of this call; None for
                documents of text.

        Raises:
            ValueError: lengths that do not add up, an id that the dtype cannot hold.
        """
        flat = np.asarray(flat_tokens)
        counts = np.asarray(lengths)
        self._check(flat, counts)
        if not flat.size:
            return
        self._bin.write(flat.astype(self.dtype).data)
        self._lengths.append(counts.astype("<i4"))
        if replies is not None:
            if self._replies is None:
                self._replies = _HashedFile(self.folder / f"{self.name}.replies")
            # From here on documents are counted from the start of the shard.
            rows = shift_documents(replies, self.documents)
            self._replies.write(rows.astype("<i8").tobytes())
            self.replies += len(replies)
        self.tokens += flat.size
        self.documents += counts.size
        self._text_bytes += text_bytes
        self._max_token_id = max(self._max_token_id, int(flat.max()))

    def _check(self, flat: npt.NDArray[np.integer], counts: npt.NDArray[np.integer]) -> None:
        if self._entry is not None:
            raise ValueError(f"shard {self.name} is closed")
        longest = np.iinfo(np.int32).max
        fits_index = not counts.size or (counts.min() >= 1 and counts.max() <= longest)
        if counts.sum() != flat.size or not fits_index:
            raise ValueError(
                f"shard {self.name}: document lengths must be >= 1 and add up to the {flat.size}"
                " tokens"
            )
        if not flat.size:
            return
        low = int(flat.min())
        high = int(flat.max())
        if low < 0 or high > np.iinfo(self.dtype).max:
            raise ValueError(f"shard {self.name}: token ids {low}..{high} do not fit {self.dtype}")

    def close(self) -> ShardEntry:
        """Write the index, give all files their names and return the manifest's entry.

        A second call returns the entry again.
        """
        if self._entry is not None:
            return self._entry
        try:
            bin_xxh3 = self._bin.finish()
            self._idx = _HashedFile(self.folder / f"{self.name}.idx")
            for piece in self._index():
                self._idx.write(piece)
            idx_xxh3 = self._idx.finish()
            replies_xxh3 = ""
            if self._replies is not None:
                replies_xxh3 = self._replies.finish()
            # No file gets its name before all are complete on the disk.
            for file in self._files():
                file.publish()
            sync_folder(self.folder)
        except BaseException:
            self.abort()
            raise
        self._lengths.clear()
        self._entry = ShardEntry(
            name=self.name,
            split=self.split,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self._text_bytes,
            max_token_id=self._max_token_id,
            bin_bytes=self._bin.bytes,
            idx_bytes=self._idx.bytes,
            bin_xxh3=bin_xxh3,
            idx_xxh3=idx_xxh3,
            replies=self.replies,
            replies_xxh3=replies_xxh3,
        )
        return self._entry

    def abort(self) -> None:
        """Remove what was written."""
        for file in self._files():
            file.discard()

    def _files(self) -> list[_HashedFile]:
        return [file for file in (self._bin, self._idx, self._replies) if file is not None]

    def _index(self) -> Iterator[bytes]:
        """Yield the index piece by piece: header, lengths, byte offsets, document indices."""
        num_indices = self.documents + 1
        yield HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], self.documents, num_indices)
        for lengths in self._lengths:
            yield lengths.tobytes()
        # Documents of 3, 1 and 4 tokens of two bytes start at bytes 0, 6 and 8.
        offset = 0
        for lengths in self._lengths:
            ends = offset + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            yield np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes()
            offset = int(ends[-1])
        # One document is one sequence, so the document indices count 0, 1, 2, ...
        for first in range(0, num_indices, CHUNK):
            yield np.arange(first, min(first + CHUNK, num_indices), dtype="<i8").tobytes()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._entry is not None:
            return
        if kind is None:
            self.close()
        else:
            self.abort()


def shard_name(split: str, number: int) -> str:
    """Return the name of a shard of a split, numbered from 0."""
    return f"{split}-{number:05d}"


class SplitWriter:
    """Writes the shards of one split, and begins a new shard when the current one is full.

    As a context manager, it discards a shard that `finish` has not closed.

    Args:
        folder: existing folder of the corpus.
        split: name of the split, with which the names of its shards begin.
        dtype: dtype of the token ids, from `token_dtype`.
        limit: number of tokens with which a shard is full; its last document may exceed it.
        unit: unit of work that the shards belong to, which names them train-00042-000, ...; None
            names them train-00000, train-00001, ...
    """

    def __init__(
        self, folder: Path, split: str, dtype: npt.DTypeLike, limit: int, unit: int | None = None
    ) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._limit = limit
        self._unit = unit
        self._writer: ShardWriter | None = None
        self._entries: list[ShardEntry] = []

    def append(self, flat: I64, lengths: I64, text_bytes: I64, replies: I64 | None = None) -> None:
        """Add documents; where shards end does not depend on how documents are grouped into calls.

        Args:
            flat: token ids of the documents, concatenated, EOS included, int64 [tokens].
            lengths: tokens of each document, int64 [documents].
            text_bytes: UTF-8 bytes of each document's text, int64 [documents].
            replies: rows of REPLY_FIELDS, documents counted from the first of this call; None for
                documents of text.
        """
        ends = np.cumsum(lengths)
        # Documents first..last-1 go to the current shard, their tokens are start..stop-1. With a
        # limit of 10 and documents of 4, 4, 4 and 4 tokens, the first three fill a shard (12).
        first = 0
        start = 0
        while first < len(lengths):
            if self._writer is None:
                self._writer = ShardWriter(
                    self._folder, self._next_name(), self._dtype, self._split
                )
            room = self._limit - self._writer.tokens
            last = min(int(np.searchsorted(ends, start + room)) + 1, len(lengths))
            stop = int(ends[last - 1])
            own_replies = None
            if replies is not None:
                low, high = np.searchsorted(replies[:, 0], (first, last))
                own_replies = shift_documents(replies[low:high], -first)
            self._writer.append(
                flat[start:stop],
                lengths[first:last],
                int(text_bytes[first:last].sum()),
                own_replies,
            )
            first = last
            start = stop
            if self._writer.tokens >= self._limit:
                self._close()

    def _next_name(self) -> str:
        if self._unit is None:
            return shard_name(self._split, len(self._entries))
        return f"{shard_name(self._split, self._unit)}-{len(self._entries):03d}"

    def finish(self) -> list[ShardEntry]:
        """Close the last shard; return the manifest's entries of all shards."""
        self._close()
        return self._entries

    def abort(self) -> None:
        """Discard an open shard."""
        if self._writer is not None:
            self._writer.abort()

    def _close(self) -> None:
        if self._writer is not None:
            self._entries.append(self._writer.close())
            self._writer = None

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

"""Shards of token ids on disk, in Megatron's indexed dataset format (.bin/.idx): writing and
reading.

A shard is two files. NAME.bin holds the token ids, one document after the other, each document its
tokens and one EOS. NAME.idx, little-endian: b"MMIDIDX\\0\\0", u64 version 1, u8 dtype code (4
int32, 8 uint16), u64 sequences, u64 document indices (sequences + 1), then int32 lengths, int64
byte offsets and int64 document indices. A sequence is one document.

Where documents are conversations there is a third file, NAME.replies: little-endian int64 rows of
REPLY_FIELDS, sorted by document.
"""

from __future__ import annotations

import bisect
import os
import resource
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from llada.data.shard_files import DTYPES, HEADER, MAGIC, IndexFile, TokenFile, damaged, map_file
from llada.files import sync_folder

I64 = npt.NDArray[np.int64]

_CODES = {dtype: code for code, dtype in DTYPES.items()}
REPLY_FIELDS = ("document", "history_end", "turn_start", "response_start", "turn_end")
"""Of one reply: its document in the shard, and offsets into that document's tokens
(llada.chat.format.Reply).
"""
_MOST_OPEN = 16384
"""Files of one kind that stay open at most, whatever the system allows."""
CHUNK = 1 << 22
"""Tokens or documents handled at a time, and bytes hashed at a time: bounds the memory of writing
an index and of checks.
"""


def token_dtype(rows: int) -> np.dtype[Any]:
    """The dtype of token ids for a vocabulary of `rows` rows: uint16 below 65500, else int32
    (Megatron's rule).
    """
    return DTYPES[8] if rows < 65500 else DTYPES[4]


class _HashedFile:
    """A file under a temporary name whose checksum and size are known when it is complete."""

    def __init__(self, path: Path) -> None:
        # Another process may be writing the same file: a unit of work that two tasks do gives the
        # same bytes twice.
        self.path, self.partial = (
            path,
            path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}"),
        )
        self.bytes = 0
        self._published = False
        self._hash = xxhash.xxh3_64()
        self._file: BinaryIO = open(self.partial, "wb")  # noqa: SIM115 (outlives this method; closed by finish or discard)

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += memoryview(data).nbytes

    def finish(self) -> str:
        """Everything is on the disk, still under the temporary name; returns the checksum."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def publish(self) -> None:
        os.replace(self.partial, self.path)
        self._published = True

    def discard(self) -> None:
        """Leave nothing of this file, published or not; a file that had the name before is left
        alone.
        """
        self._file.close()
        self.partial.unlink(missing_ok=True)
        if self._published:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard; checksums are xxh3_64 in hexadecimal. Only conversations
    have replies.
    """

    name: str
    split: str
    documents: int
    tokens: int
    text_bytes: int
    max_token_id: int
    bin_bytes: int
    idx_bytes: int
    bin_xxh3: str
    idx_xxh3: str
    replies: int = 0
    replies_xxh3: str = ""


class ShardWriter:
    """Writes one shard. The files appear under their names when it closes; an exception before that
    leaves nothing.

    Args:
        folder: existing folder of the corpus.
        name: of the shard, unique in the folder.
        dtype: from `token_dtype`.
        split: recorded in the entry.

    Attributes:
        tokens, documents, replies: written so far.
    """

    def __init__(self, folder: str | Path, name: str, dtype: npt.DTypeLike, split: str) -> None:
        self.folder, self.name, self.dtype, self.split = Path(folder), name, np.dtype(dtype), split
        if self.dtype not in _CODES:
            raise ValueError(
                f"token dtype {self.dtype} is not one of {', '.join(map(str, _CODES))}"
            )
        self.tokens = self.documents = 0
        self._text_bytes, self._max_token_id = 0, 0
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._entry: ShardEntry | None = None
        self._bin = _HashedFile(self.folder / f"{name}.bin")
        self._idx: _HashedFile | None = None
        self._replies: _HashedFile | None = None
        self.replies = 0

    def append(
        self,
        flat_tokens: npt.ArrayLike,
        lengths: npt.ArrayLike,
        text_bytes: int,
        replies: I64 | None = None,
    ) -> None:
        """Add documents.

        Args:
            flat_tokens: their token ids one after the other, each document's EOS in place.
            lengths: tokens of each document, EOS included, all >= 1.
            text_bytes: UTF-8 bytes of their text (of the replies, where documents are
                conversations).
            replies: rows of REPLY_FIELDS, the document counted from the first of this call; None:
                not conversations.

        Raises:
            ValueError: lengths that do not add up, an id that the dtype cannot hold.
        """
        flat, counts = np.asarray(flat_tokens), np.asarray(lengths)
        if self._entry is not None:
            raise ValueError(f"shard {self.name} is closed")
        if counts.sum() != flat.size or (
            counts.size and not 1 <= counts.min() <= counts.max() <= np.iinfo(np.int32).max
        ):
            raise ValueError(
                f"shard {self.name}: document lengths must be >= 1 and add up to the {flat.size}"
                " tokens"
            )
        if not flat.size:
            return
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high > np.iinfo(self.dtype).max:
            raise ValueError(f"shard {self.name}: token ids {low}..{high} do not fit {self.dtype}")
        self._bin.write(flat.astype(self.dtype).data)
        self._lengths.append(counts.astype("<i4"))
        if replies is not None:
            self._replies = self._replies or _HashedFile(self.folder / f"{self.name}.replies")
            self._replies.write(
                (replies + np.array([self.documents, 0, 0, 0, 0])).astype("<i8").tobytes()
            )
            self.replies += len(replies)
        self.tokens += flat.size
        self.documents += counts.size
        self._text_bytes += text_bytes
        self._max_token_id = max(self._max_token_id, high)

    def close(self) -> ShardEntry:
        """Write the index, put both files in place and return the manifest's entry; a second call
        returns it again.
        """
        if self._entry is not None:
            return self._entry
        try:
            bin_xxh3 = self._bin.finish()
            self._idx = _HashedFile(self.folder / f"{self.name}.idx")
            for part in self._index():
                self._idx.write(part)
            idx_xxh3 = self._idx.finish()
            replies_xxh3 = "" if self._replies is None else self._replies.finish()
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
        yield HEADER.pack(MAGIC, 1, _CODES[self.dtype], self.documents, self.documents + 1)
        for lengths in self._lengths:
            yield lengths.tobytes()
        offset = 0
        for lengths in self._lengths:
            ends = offset + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            yield np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes()
            offset = int(ends[-1])
        for first in range(0, self.documents + 1, CHUNK):
            yield np.arange(first, min(first + CHUNK, self.documents + 1), dtype="<i8").tobytes()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._entry is None:
            if kind is None:
                self.close()
            else:
                self.abort()


def shard_name(split: str, number: int) -> str:
    """Of a shard of a split, from 0."""
    return f"{split}-{number:05d}"


class SplitWriter:
    """The shards of one split: a new one when the current one is full. As a context, it gives up
    what `finish` has not closed.

    Args:
        folder: existing folder of the corpus.
        split: its name, with which the names of its shards begin.
        dtype: from `token_dtype`.
        limit: tokens; a shard ends with the document with which it has this many.
        unit: the shards are parts, of this unit of work: train-00042-000, ...; None: they are
            train-00000, train-00001, ...
    """

    def __init__(
        self, folder: Path, split: str, dtype: npt.DTypeLike, limit: int, unit: int | None = None
    ) -> None:
        self._folder, self._split, self._dtype, self._limit, self._unit = (
            folder,
            split,
            dtype,
            limit,
            unit,
        )
        self._writer: ShardWriter | None = None
        self._entries: list[ShardEntry] = []

    def append(self, flat: I64, lengths: I64, text_bytes: I64, replies: I64 | None = None) -> None:
        """Add documents; where shards end does not depend on how documents are grouped into calls.

        Args:
            flat: token ids one after the other, each document's EOS in place.
            lengths, text_bytes: of each document.
            replies: rows of REPLY_FIELDS, the document counted from the first of this call; None:
                not conversations.
        """
        ends = np.cumsum(lengths)
        first, start = 0, 0
        while first < len(lengths):
            if self._writer is None:
                self._writer = ShardWriter(
                    self._folder, self._next_name(), self._dtype, self._split
                )
            room = self._limit - self._writer.tokens
            last = min(int(np.searchsorted(ends, start + room)) + 1, len(lengths))
            stop = int(ends[last - 1])
            own = None
            if replies is not None:
                low, high = np.searchsorted(replies[:, 0], (first, last))
                own = replies[low:high] - np.array([first, 0, 0, 0, 0])
            self._writer.append(
                flat[start:stop], lengths[first:last], int(text_bytes[first:last].sum()), own
            )
            first, start = last, stop
            if self._writer.tokens >= self._limit:
                self._close()

    def _next_name(self) -> str:
        if self._unit is None:
            return shard_name(self._split, len(self._entries))
        return f"{shard_name(self._split, self._unit)}-{len(self._entries):03d}"

    def finish(self) -> list[ShardEntry]:
        """Close the last shard; returns the manifest's entries of all."""
        self._close()
        return self._entries

    def abort(self) -> None:
        """Give up an open shard."""
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


class Shard:
    """A shard, both files open.

    Args:
        path: of both files, without .bin and .idx.

    Attributes:
        num_tokens, num_documents: its size.
        dtype: of its token ids.
        index: its documents; lengths, pointers and indices are those of the index.

    Raises:
        UserError: a missing file, a header or a size that cannot be right.
    """

    def __init__(self, path: str | Path) -> None:
        self.bin_path, self.idx_path = Path(f"{path}.bin"), Path(f"{path}.idx")
        self.index = IndexFile(self.idx_path)
        self.dtype, self.num_documents = self.index.dtype, self.index.num_documents
        self._tokens = TokenFile(self.bin_path, self.dtype, self.index.end, "its index ends at")
        self.num_tokens = self._tokens.num_tokens
        self.tokens, self.document_starts = self._tokens.tokens, self.index.document_starts

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        return self.index.lengths

    @property
    def pointers(self) -> I64:
        return self.index.pointers

    @property
    def indices(self) -> I64:
        return self.index.indices

    def runs(
        self, first: int = 0, stop: int | None = None, tokens: int = CHUNK
    ) -> Iterator[tuple[int, I64, I64]]:
        """Whole documents in order, some at a time, so that memory is bounded by `tokens` and the
        longest document.

        Args:
            first, stop: documents first..stop-1; None: to the last.
            tokens: at most, in a run of several documents.

        Yields:
            The first document of a run, its token ids (a copy), and the length of each of its
            documents.
        """
        stop, item = self.num_documents if stop is None else stop, self.dtype.itemsize
        while first < stop:
            start = int(self.pointers[first]) // item
            last = (
                bisect.bisect_right(self.pointers, (start + tokens) * item, lo=first + 1, hi=stop)
                - 1
            )
            last = max(last, first + 1)
            lengths = self.lengths[first:last].astype(np.int64)
            yield first, self.tokens(start, start + int(lengths.sum())), lengths
            first = last


class OpenFiles:
    """Files of shards that stay open, so that the next read needs no opening; the longest unused
    ones are let go.

    Threads may share it. A file in use is not closed under its reader.

    Args:
        capacity: of each kind; None: an eighth of the files that this process may have open.
    """

    def __init__(self, capacity: int | None = None) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        known = 0 <= limit < 8 * _MOST_OPEN
        self.capacity = capacity or (max(1, limit // 8) if known else _MOST_OPEN)
        self.tokens = lru_cache(maxsize=self.capacity)(TokenFile)
        self.index = lru_cache(maxsize=self.capacity)(IndexFile)
        self.shard = lru_cache(maxsize=self.capacity)(Shard)


def map_replies(path: Path) -> I64:
    """The rows of a .replies file, memory-mapped int64 [replies, 5]. Raises UserError when it
    cannot be one.
    """
    rows = map_file(path, np.dtype("<i8"))
    if rows.size % len(REPLY_FIELDS):
        raise damaged(path, f"{8 * rows.size} bytes, not a multiple of {8 * len(REPLY_FIELDS)}")
    return rows.reshape(-1, len(REPLY_FIELDS))

"""Shards of token ids on disk, in Megatron's indexed dataset format (.bin/.idx): writing and reading.

A shard is two files. NAME.bin holds the token ids, one document after the other, each document its tokens and one EOS.
NAME.idx, little-endian: b"MMIDIDX\\0\\0", u64 version 1, u8 dtype code (4 int32, 8 uint16), u64 sequences, u64 document
indices (sequences + 1), then int32 lengths, int64 byte offsets and int64 document indices. A sequence is one document.

Where documents are conversations there is a third file, NAME.replies: little-endian int64 rows of REPLY_FIELDS, sorted by document.
"""

from __future__ import annotations

import bisect
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from llada.errors import UserError
from llada.files import sync_folder

I64 = npt.NDArray[np.int64]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
REPLY_FIELDS = ("document", "history_end", "turn_start", "response_start", "turn_end")
"""Of one reply: its document in the shard, and offsets into that document's tokens (llada.chat.Reply)."""
CHUNK = 1 << 22
"""Tokens or documents handled at a time, and bytes hashed at a time: bounds the memory of writing an index and of checks."""


def token_dtype(rows: int) -> np.dtype[Any]:
    """The dtype of token ids for a vocabulary of `rows` rows: uint16 below 65500, else int32 (Megatron's rule)."""
    return _DTYPES[8] if rows < 65500 else _DTYPES[4]


class _HashedFile:
    """A file under a temporary name whose checksum and size are known when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        self.bytes = 0
        self._published = False
        self._hash = xxhash.xxh3_64()
        self._file: BinaryIO = open(self.partial, "wb")  # noqa: SIM115 (outlives this method; closed by finish or discard)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

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
        """Leave nothing of this file, published or not; a file that had the name before is left alone."""
        self._file.close()
        self.partial.unlink(missing_ok=True)
        if self._published:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard; checksums are xxh3_64 in hexadecimal. Only conversations have replies."""

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
    """Writes one shard. The files appear under their names when it closes; an exception before that leaves nothing.

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
            raise ValueError(f"token dtype {self.dtype} is not one of {', '.join(map(str, _CODES))}")
        self.tokens = self.documents = 0
        self._text_bytes, self._max_token_id = 0, 0
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._entry: ShardEntry | None = None
        self._bin = _HashedFile(self.folder / f"{name}.bin")
        self._idx: _HashedFile | None = None
        self._replies: _HashedFile | None = None
        self.replies = 0

    def append(self, flat_tokens: npt.ArrayLike, lengths: npt.ArrayLike, text_bytes: int, replies: I64 | None = None) -> None:
        """Add documents.

        Args:
            flat_tokens: their token ids one after the other, each document's EOS in place.
            lengths: tokens of each document, EOS included, all >= 1.
            text_bytes: UTF-8 bytes of their text (of the replies, where documents are conversations).
            replies: rows of REPLY_FIELDS, the document counted from the first of this call; None: not conversations.

        Raises:
            ValueError: lengths that do not add up, an id that the dtype cannot hold.
        """
        flat, counts = np.asarray(flat_tokens), np.asarray(lengths)
        if self._entry is not None:
            raise ValueError(f"shard {self.name} is closed")
        if counts.sum() != flat.size or (counts.size and not 1 <= counts.min() <= counts.max() <= np.iinfo(np.int32).max):
            raise ValueError(f"shard {self.name}: document lengths must be >= 1 and add up to the {flat.size} tokens")
        if not flat.size:
            return
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high > np.iinfo(self.dtype).max:
            raise ValueError(f"shard {self.name}: token ids {low}..{high} do not fit {self.dtype}")
        self._bin.write(flat.astype(self.dtype).tobytes())
        self._lengths.append(counts.astype("<i4"))
        if replies is not None:
            self._replies = self._replies or _HashedFile(self.folder / f"{self.name}.replies")
            self._replies.write((replies + np.array([self.documents, 0, 0, 0, 0])).astype("<i8").tobytes())
            self.replies += len(replies)
        self.tokens += flat.size
        self.documents += counts.size
        self._text_bytes += text_bytes
        self._max_token_id = max(self._max_token_id, high)

    def close(self) -> ShardEntry:
        """Write the index, put both files in place and return the manifest's entry; a second call returns it again."""
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
        yield _HEADER.pack(_MAGIC, 1, _CODES[self.dtype], self.documents, self.documents + 1)
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

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._entry is None:
            if kind is None:
                self.close()
            else:
                self.abort()


class Shard:
    """A shard, memory-mapped.

    Args:
        path: of both files, without .bin and .idx.

    Attributes:
        num_tokens, num_documents: its size.
        lengths, pointers, indices: the index's three arrays as stored; its odd header leaves them unaligned in memory, and
            numpy copies an unaligned array whole before it searches or computes. Slice them.

    Raises:
        UserError: a missing file, a header or a size that cannot be right.
    """

    def __init__(self, path: str | Path) -> None:
        self.bin_path, self.idx_path = Path(f"{path}.bin"), Path(f"{path}.idx")
        index = _map(self.idx_path, np.dtype(np.uint8))
        if index.size < _HEADER.size:
            raise damaged(self.idx_path, f"{index.size} bytes, shorter than its header")
        magic, version, code, n, entries = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != _MAGIC or version != 1 or code not in _DTYPES or entries != n + 1:
            raise damaged(self.idx_path, "its header is not that of an index with one sequence a document")
        expected = _HEADER.size + 4 * n + 8 * n + 8 * (n + 1)
        if index.size != expected:
            raise damaged(self.idx_path, f"{index.size} bytes, {n} documents need {expected}")
        self.dtype = _DTYPES[code]
        self.num_documents = int(n)
        self.lengths = np.frombuffer(index, "<i4", n, _HEADER.size)
        self.pointers = np.frombuffer(index, "<i8", n, _HEADER.size + 4 * n)
        self.indices = np.frombuffer(index, "<i8", n + 1, _HEADER.size + 12 * n)
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if n else 0
        size = size_of(self.bin_path)
        if size != end:
            raise damaged(self.bin_path, f"{size} bytes, its index ends at {end}")
        self._tokens = _map(self.bin_path, self.dtype)
        self.num_tokens = int(self._tokens.size)

    def tokens(self, start: int, stop: int) -> I64:
        """A copy of the token ids at start..stop-1."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"{self.bin_path}: tokens {start}..{stop} of {self.num_tokens}")
        return self._tokens[start:stop].astype(np.int64)

    def document_starts(self, start: int, stop: int) -> I64:
        """Offsets (in tokens, from the shard's start) of the documents that start strictly inside (start, stop)."""
        item = self.dtype.itemsize
        first = bisect.bisect_right(self.pointers, start * item)  # a search that copies nothing, see `pointers`
        last = bisect.bisect_left(self.pointers, stop * item, lo=first)
        return self.pointers[first:last].astype(np.int64) // item


def map_replies(path: Path) -> I64:
    """The rows of a .replies file, memory-mapped int64 [replies, 5]. Raises UserError when it cannot be one."""
    rows = _map(path, np.dtype("<i8"))
    if rows.size % len(REPLY_FIELDS):
        raise damaged(path, f"{8 * rows.size} bytes, not a multiple of {8 * len(REPLY_FIELDS)}")
    return rows.reshape(-1, len(REPLY_FIELDS))


def damaged(path: Path, why: str) -> UserError:
    """The refusal of a file that is not what was written."""
    return UserError(f"{path}: truncated or altered ({why}); prepare the corpus again")


def size_of(path: Path) -> int:
    """Bytes of a file. Raises UserError when it cannot be read."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: truncated or altered, cannot be read ({error.strerror}); prepare the corpus again") from None


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if size_of(path) == 0:
        return np.empty(0, dtype)
    try:
        return np.asarray(np.memmap(path, dtype, mode="r"))
    except OSError as error:
        raise UserError(f"{path}: truncated or altered, cannot be read ({error.strerror}); prepare the corpus again") from None

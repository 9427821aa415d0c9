"""Reading the two files of a shard; llada/data/shards.py says what is in them."""

from __future__ import annotations

import os
import struct
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llada.errors import UserError

I64 = npt.NDArray[np.int64]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_POINTER = np.dtype("<i8")
_BLOCK = 1024
"""Pointers of an index that are read at a time: two pages."""
_GUESSES = 4
"""Guesses by proportion before the search for a document halves the range."""


class _File:
    """A file of a shard, open until nobody holds it any more.

    Read by position and not through a memory map: a read lets other threads run while it waits for
    the disk, a failing disk is an exception and not a signal, and what was read is not counted as
    memory of this process.

    Attributes:
        path: its name, for messages.
        size: in bytes.

    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            self.size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise unreadable(path, error) from None

    def read(self, dtype: np.dtype[Any], count: int, offset: int) -> npt.NDArray[Any]:
        """A new array of `count` items from byte `offset` on. Raises UserError when the disk fails
        or the file ends before.
        """
        out = np.empty(count, dtype)
        left, at = out.view(np.uint8).data, offset
        while left:
            try:
                done = os.preadv(self._descriptor, [left], at)
            except OSError as error:
                raise unreadable(self.path, error) from None
            if not done:
                raise damaged(self.path, f"it ends at byte {at}")
            left, at = left[done:], at + done
        return out


class TokenFile:
    """The .bin file of a shard.

    Args:
        path: with .bin.
        dtype: of its ids.
        size: bytes that it must have.
        said_by: who says so, for the message.

    Raises:
        UserError: a missing file, another size.
    """

    def __init__(
        self, path: str | Path, dtype: np.dtype[Any], size: int, said_by: str = "the manifest says"
    ) -> None:
        self._file = _File(Path(path))
        if self._file.size != size:
            raise damaged(self._file.path, f"{self._file.size} bytes, {said_by} {size}")
        self.dtype = dtype
        self.num_tokens = size // dtype.itemsize

    def tokens(self, start: int, stop: int) -> I64:
        """A copy of the token ids at start..stop-1."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"{self._file.path}: tokens {start}..{stop} of {self.num_tokens}")
        return self._file.read(self.dtype, stop - start, start * self.dtype.itemsize).astype(
            np.int64
        )


class IndexFile:
    """The .idx file of a shard.

    Args:
        path: with .idx.
        end: bytes of the token file; None: what the index itself says.

    Attributes:
        num_documents: documents in the shard.
        dtype: of its token ids.
        end: bytes of the token file.
        lengths, pointers, indices: the three arrays as stored, memory-mapped when first asked for;
        the odd header leaves them
            unaligned in memory, and numpy copies an unaligned array whole before it searches or
            computes. Slice them.

    Raises:
        UserError: a missing file, a header or a size that cannot be right.
    """

    def __init__(self, path: str | Path, end: int | None = None) -> None:
        self._file = _File(Path(path))
        size = self._file.size
        if size < HEADER.size:
            raise damaged(self._file.path, f"{size} bytes, shorter than its header")
        magic, version, code, n, entries = HEADER.unpack(
            self._file.read(np.dtype(np.uint8), HEADER.size, 0).tobytes()
        )
        if magic != MAGIC or version != 1 or code not in DTYPES or entries != n + 1:
            raise damaged(
                self._file.path, "its header is not that of an index with one sequence a document"
            )
        expected = HEADER.size + 4 * n + 8 * n + 8 * (n + 1)
        if size != expected:
            raise damaged(self._file.path, f"{size} bytes, {n} documents need {expected}")
        self.dtype = DTYPES[code]
        self.num_documents = int(n)
        self.end = self._own_end() if end is None else end

    @cached_property
    def _bytes(self) -> npt.NDArray[np.uint8]:
        return map_file(self._file.path, np.dtype(np.uint8))

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        return np.frombuffer(self._bytes, "<i4", self.num_documents, HEADER.size)

    @property
    def pointers(self) -> I64:
        return np.frombuffer(
            self._bytes, "<i8", self.num_documents, HEADER.size + 4 * self.num_documents
        )

    @property
    def indices(self) -> I64:
        return np.frombuffer(
            self._bytes, "<i8", self.num_documents + 1, HEADER.size + 12 * self.num_documents
        )

    def document_starts(self, start: int, stop: int) -> I64:
        """Offsets (in tokens, from the shard's start) of the documents that start strictly inside
        (start, stop).
        """
        item = self.dtype.itemsize
        first, block = self._around(start * item)
        found = block[np.searchsorted(block, start * item, side="right") :]
        parts, last = [found], first + len(block)
        while last < self.num_documents and block[-1] < stop * item:
            block = self._read_pointers(last, min(last + _BLOCK, self.num_documents))
            parts, last = [*parts, block], last + len(block)
        inside = np.concatenate(parts) if len(parts) > 1 else found
        return inside[: np.searchsorted(inside, stop * item)] // item

    def document_at(self, position: int) -> int:
        """The document that holds the token at `position`, counted from the shard's start."""
        value = position * self.dtype.itemsize
        first, block = self._around(value)
        return first + int(np.searchsorted(block, value, side="right")) - 1

    def _around(self, value: int) -> tuple[int, I64]:
        """A piece of the pointers, and where it starts, such that all before it are <= value and
        all behind it are > value.

        Documents of one shard are mostly alike, so a guess by proportion is near and a cold index
        costs few reads; where the guesses do not help, the range is halved.
        """
        first, last, low, high = 0, self.num_documents, 0, self.end
        guesses = 0
        while last - first > _BLOCK:
            middle = (first + last) // 2
            guess = (
                first + (value - low) * (last - first) // max(1, high - low)
                if guesses < _GUESSES
                else middle
            )
            begin = min(max(guess - _BLOCK // 2, first), last - _BLOCK)
            block = self._read_pointers(begin, begin + _BLOCK)
            guesses += 1
            if block[0] > value:
                last, high = begin, int(block[0])
            elif block[-1] <= value:
                first, low = begin + _BLOCK - 1, int(block[-1])
            else:
                return begin, block
        return first, self._read_pointers(first, last)

    def _read_pointers(self, first: int, last: int) -> I64:
        return self._file.read(
            _POINTER, last - first, HEADER.size + 4 * self.num_documents + _POINTER.itemsize * first
        )

    def _own_end(self) -> int:
        n = self.num_documents
        if not n:
            return 0
        length = self._file.read(np.dtype("<i4"), 1, HEADER.size + 4 * (n - 1))
        return int(self._read_pointers(n - 1, n)[0]) + int(length[0]) * self.dtype.itemsize


def damaged(path: Path, why: str) -> UserError:
    """The refusal of a file that is not what was written."""
    return UserError(f"{path}: truncated or altered ({why}); prepare the corpus again")


def unreadable(path: Path, error: OSError) -> UserError:
    """The refusal of a file that the system does not give."""
    if isinstance(error, FileNotFoundError):
        return UserError(
            f"{path}: missing from the corpus {path.parent}; put it back, or prepare the corpus"
            " again"
        )
    return UserError(
        f"{path}: truncated or altered, cannot be read ({error.strerror}); prepare the corpus again"
    )


def size_of(path: Path) -> int:
    """Bytes of a file. Raises UserError when it cannot be read."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None


def map_file(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if size_of(path) == 0:
        return np.empty(0, dtype)
    try:
        return np.asarray(np.memmap(path, dtype, mode="r"))
    except OSError as error:
        raise unreadable(path, error) from None

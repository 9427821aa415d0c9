"""Reading a shard: token ids, and where documents start (llada/data/shard_format.py).

Training reads a few bytes at a time from thousands of shards, so a ShardReader opens a file when
it first needs it, reads by position, and shares a bounded set of open files
(llada/data/open_files.py) with the other shards. Passes over a whole shard map its index into
memory.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llada.arrays import I64, Number, map_file
from llada.data.manifest import ShardEntry
from llada.data.open_files import OpenFile, OpenFiles
from llada.data.shard_format import (
    CHUNK,
    DTYPES,
    HEADER,
    LENGTH_BYTES,
    MAGIC,
    POINTER_BYTES,
    REPLY_FIELDS,
    VERSION,
    IndexParts,
    TokenDtype,
    damaged,
    index_parts,
    unreadable,
)

_POINTERS_PER_READ = 1024
"""Pointers of an index that a search reads at a time: two pages."""
_GUESSES = 4
"""Guesses by proportion before the search for a document halves the range."""


class _IndexHeader(NamedTuple):
    dtype: TokenDtype
    num_documents: int


class ShardReader:
    """Reads one shard.

    With `entry`, a file is opened and compared with the manifest when it is first read, so ten
    thousand readers cost little. Without it, both files are opened at once.

    Args:
        path: path of both files, without .bin and .idx.
        entry: what the manifest says of the shard; None to believe the shard itself.
        dtype: dtype of the token ids; required with `entry`.
        open_files: cache of open files; several readers may share it.

    Attributes:
        num_documents: number of documents in the shard.
        num_tokens: number of token ids in the shard.
        dtype: dtype of the token ids on disk.

    Raises:
        UserError: in any method that opens or reads a file, when that file is missing, damaged, or
            of other counts than the manifest says.
    """

    def __init__(
        self,
        path: str | Path,
        entry: ShardEntry | None = None,
        dtype: TokenDtype | None = None,
        open_files: OpenFiles | None = None,
    ) -> None:
        self._path = str(path)
        self._entry = entry
        self._open_files = open_files or OpenFiles(capacity=2)
        self._checked_index_size: int | None = None
        self._is_checked = False
        if entry is not None:
            assert dtype is not None
            self.dtype = dtype
            self.num_documents = entry.documents
            self.num_tokens = entry.tokens
            self._token_bytes = entry.bin_bytes
        else:
            self.dtype, self.num_documents = self._read_header()
            self._token_bytes = self._end_of_last_document(self.dtype, self.num_documents)
            self.num_tokens = self._token_bytes // self.dtype.itemsize
            self.check()

    @property
    def bin_path(self) -> Path:
        return Path(f"{self._path}.bin")

    @property
    def idx_path(self) -> Path:
        return Path(f"{self._path}.idx")

    def check(self) -> None:
        """Open both files and compare them with each other and with the manifest, the first time.

        Cheaper reads (`tokens`, `document_starts`, `document_at`) compare only the file that they
        read, and only with the manifest.
        """
        if self._is_checked:
            return
        dtype, num_documents = self._read_header()
        end = self._end_of_last_document(dtype, num_documents)
        size = self._open_files.get(f"{self._path}.bin").size
        if size != end:
            raise damaged(self.bin_path, f"{size} bytes, its index ends at {end}")
        self._compare_with_manifest(self.idx_path, num_documents, size // dtype.itemsize, dtype)
        self._token_bytes = size
        self._is_checked = True

    # -- single reads --------------------------------------------------------------------------

    def tokens(self, start: int, stop: int) -> I64:
        """Return a copy of the token ids at start..stop-1; opens the token file only."""
        file = self._token_file()
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"{file.path}: tokens {start}..{stop} of {self.num_tokens}")
        return file.read(self.dtype, stop - start, start * self.dtype.itemsize).astype(np.int64)

    def document_starts(self, start: int, stop: int) -> I64:
        """Return the offsets of the documents that start strictly inside (start, stop).

        Offsets are in tokens from the start of the shard. Opens the index only.
        """
        file = self._index_file()
        start_byte = start * self.dtype.itemsize
        stop_byte = stop * self.dtype.itemsize
        first, block = self._pointers_around(file, start_byte)
        blocks = [block[np.searchsorted(block, start_byte, side="right") :]]
        last = first + len(block)
        # One block is enough unless very short documents crowd the window.
        while last < self.num_documents and block[-1] < stop_byte:
            block = self._read_pointers(
                file, last, min(last + _POINTERS_PER_READ, self.num_documents)
            )
            blocks.append(block)
            last += len(block)
        starts = blocks[0]
        if len(blocks) > 1:
            starts = np.concatenate(blocks)
        return starts[: np.searchsorted(starts, stop_byte)] // self.dtype.itemsize

    def document_at(self, position: int) -> int:
        """Return the document that contains the token at `position`; opens the index only."""
        byte = position * self.dtype.itemsize
        first, block = self._pointers_around(self._index_file(), byte)
        return first + int(np.searchsorted(block, byte, side="right")) - 1

    def document_start(self, document: int) -> int:
        """Return the offset of a document in tokens; checks the shard first."""
        self.check()
        pointer = self._read_pointers(self._index_file(), document, document + 1)
        return int(pointer[0]) // self.dtype.itemsize

    def _pointers_around(self, file: OpenFile, byte: int) -> tuple[int, I64]:
        """Read neighboring pointers such that all pointers before them are <= `byte`, and all
        after them are > `byte`.

        Documents of one shard have similar lengths, so a guess by proportion is close, and an
        index that is not in memory costs few reads: in a token file of 1,000,000 bytes with 10,000
        documents, the search for byte 250,000 begins at pointer 2,500. Where the guesses do not
        help, the range is halved.

        Returns:
            The index of the first pointer, and the pointers.
        """
        first = 0
        last = self.num_documents
        low = 0
        high = self._token_bytes
        guesses = 0
        while last - first > _POINTERS_PER_READ:
            if guesses < _GUESSES:
                middle = first + (byte - low) * (last - first) // max(1, high - low)
            else:
                middle = (first + last) // 2
            guesses += 1
            begin = min(max(middle - _POINTERS_PER_READ // 2, first), last - _POINTERS_PER_READ)
            block = self._read_pointers(file, begin, begin + _POINTERS_PER_READ)
            if block[0] > byte:
                last = begin
                high = int(block[0])
            elif block[-1] <= byte:
                first = begin + _POINTERS_PER_READ - 1
                low = int(block[-1])
            else:
                return begin, block
        return first, self._read_pointers(file, first, last)

    # -- a whole shard -------------------------------------------------------------------------

    # The odd header (34 bytes) leaves the arrays of the index unaligned in memory, and numpy copies
    # an unaligned array whole before it searches or computes. Callers slice them first.

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of every document, memory-mapped [num_documents]."""
        return np.frombuffer(self._map_index(), "<i4", self.num_documents, self._parts.lengths)

    @property
    def pointers(self) -> I64:
        """Offset of every document in bytes, memory-mapped [num_documents]."""
        return np.frombuffer(self._map_index(), "<i8", self.num_documents, self._parts.pointers)

    @property
    def indices(self) -> I64:
        """Megatron's document indices, here 0, 1, 2, ..., memory-mapped [num_documents + 1]."""
        return np.frombuffer(self._map_index(), "<i8", self.num_documents + 1, self._parts.indices)

    @property
    def _parts(self) -> IndexParts:
        return index_parts(self.num_documents, self.num_documents + 1)

    def runs(
        self, first: int = 0, stop: int | None = None, tokens: int = CHUNK
    ) -> Iterator[tuple[int, I64, I64]]:
        """Read whole documents in order, in runs of several.

        Memory is bounded by `tokens` and the longest document.

        Args:
            first: first document to read.
            stop: document after the last one to read; None to read to the end.
            tokens: most tokens in a run of several documents.

        Yields:
            The first document of a run, the token ids of the run (a copy), and the length of each
            of its documents.
        """
        if stop is None:
            stop = self.num_documents
        pointers = self.pointers
        all_lengths = self.lengths
        itemsize = self.dtype.itemsize
        while first < stop:
            start = int(pointers[first]) // itemsize
            limit = (start + tokens) * itemsize
            # bisect, not numpy, which would copy the unaligned array.
            last = bisect.bisect_right(pointers, limit, lo=first + 1, hi=stop) - 1
            # A document that is longer than `tokens` is a run of its own.
            last = max(last, first + 1)
            lengths = all_lengths[first:last].astype(np.int64)
            yield first, self.tokens(start, start + int(lengths.sum())), lengths
            first = last

    # -- files ---------------------------------------------------------------------------------

    def _token_file(self) -> OpenFile:
        """Return the open token file, compared with the manifest."""
        file = self._open_files.get(f"{self._path}.bin")
        if file.size != self._token_bytes:
            raise damaged(file.path, f"{file.size} bytes, the manifest says {self._token_bytes}")
        num_tokens = file.size // self.dtype.itemsize
        if num_tokens != self.num_tokens:
            self._compare_with_manifest(file.path, self.num_documents, num_tokens, self.dtype)
        return file

    def _index_file(self) -> OpenFile:
        """Return the open index, compared with the manifest."""
        file = self._open_files.get(f"{self._path}.idx")
        # Once is enough, unless another file has taken its place since it was last open.
        if file.size != self._checked_index_size:
            dtype, num_documents = self._read_header()
            self._compare_with_manifest(file.path, num_documents, self.num_tokens, dtype)
            self._checked_index_size = file.size
        return file

    def _read_header(self) -> _IndexHeader:
        file = self._open_files.get(f"{self._path}.idx")
        if file.size < HEADER.size:
            raise damaged(file.path, f"{file.size} bytes, shorter than its header")
        content = file.read(np.dtype(np.uint8), HEADER.size, 0).tobytes()
        magic, version, code, sequences, entries = HEADER.unpack(content)
        is_known = magic == MAGIC and version == VERSION and code in DTYPES
        if not is_known or entries != sequences + 1:
            raise damaged(
                file.path, "its header is not that of an index with one sequence per document"
            )
        expected = index_parts(sequences, entries).end
        if file.size != expected:
            raise damaged(file.path, f"{file.size} bytes, {sequences} documents need {expected}")
        return _IndexHeader(DTYPES[code], int(sequences))

    def _end_of_last_document(self, dtype: TokenDtype, num_documents: int) -> int:
        """Return the size of the token file, in bytes, that follows from the index."""
        if not num_documents:
            return 0
        file = self._open_files.get(f"{self._path}.idx")
        last = num_documents - 1
        parts = index_parts(num_documents, num_documents + 1)
        length = file.read(np.dtype("<i4"), 1, parts.lengths + LENGTH_BYTES * last)
        pointer = file.read(np.dtype("<i8"), 1, parts.pointers + POINTER_BYTES * last)
        return int(pointer[0]) + int(length[0]) * dtype.itemsize

    def _read_pointers(self, file: OpenFile, first: int, last: int) -> I64:
        offset = self._parts.pointers + POINTER_BYTES * first
        return file.read(np.dtype("<i8"), last - first, offset)

    def _map_index(self) -> npt.NDArray[np.uint8]:
        self.check()
        return map_shard_file(self.idx_path, np.dtype(np.uint8))

    def _compare_with_manifest(
        self, path: Path, num_documents: int, num_tokens: int, dtype: TokenDtype
    ) -> None:
        """Raise UserError, naming `path`, when the shard contains something else than the manifest
        says.
        """
        if self._entry is None:
            return
        stored = {"documents": num_documents, "tokens": num_tokens, "dtype": dtype.name}
        expected = {
            "documents": self._entry.documents,
            "tokens": self._entry.tokens,
            "dtype": self.dtype.name,
        }
        for name, value in stored.items():
            if value != expected[name]:
                raise damaged(path, f"{name}: {value}, the manifest says {expected[name]}")


def map_replies(path: Path) -> I64:
    """Map the rows of a .replies file into memory, int64 [replies, 5].

    Raises:
        UserError: it cannot be read, or its size is not that of whole rows.
    """
    numbers = map_shard_file(path, np.dtype(np.int64))
    if numbers.size % len(REPLY_FIELDS):
        row_bytes = 8 * len(REPLY_FIELDS)
        raise damaged(path, f"{8 * numbers.size} bytes, not a multiple of {row_bytes}")
    return numbers.reshape(-1, len(REPLY_FIELDS))


def map_shard_file(path: Path, dtype: np.dtype[Number]) -> npt.NDArray[Number]:
    """Map a file of a shard into memory, read-only. Raises UserError when it cannot be read."""
    try:
        return map_file(path, dtype)
    except OSError as error:
        raise unreadable(path, error) from None

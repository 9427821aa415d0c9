"""Megatron's indexed datasets (.bin and .idx), whoever wrote them: any dtype of token ids, any
number of sequences a document.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llada.data.shard_format import CHUNK, I64
from llada.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
_DOCUMENTS = 1 << 16


class IndexedDataset:
    """One dataset, memory-mapped and checked.

    The index: magic, u64 version, u8 dtype code, u64 sequences n, u64 document indices d; then
    int32 lengths [n], int64 byte offsets [n], and int64 document indices [d]: document k is
    sequences indices[k] to indices[k + 1] - 1.

    Args:
        path: either file, or both without .bin and .idx.

    Attributes:
        bin_path, idx_path: its files.
        num_documents, num_tokens: its size.

    Raises:
        UserError: a missing file; an index of another format, or that contradicts itself or the
            size of the token file.
    """

    def __init__(self, path: str | Path) -> None:
        base = str(path)
        base = base[:-4] if base.endswith((".bin", ".idx")) else base
        self.bin_path, self.idx_path = Path(f"{base}.bin"), Path(f"{base}.idx")
        for file, other in ((self.idx_path, self.bin_path), (self.bin_path, self.idx_path)):
            if not file.is_file():
                raise UserError(
                    f"{file}: no such file; a dataset is a .bin and the .idx of the same name"
                    f" beside it ({other.name})"
                )
        index = _mapped(self.idx_path, np.dtype("u1"))
        if index.size < _HEADER.size or index[:9].tobytes() != _MAGIC:
            raise UserError(
                f"{self.idx_path}: not the index of a Megatron dataset (it does not begin with"
                f" {_MAGIC[:7].decode()})"
            )
        _, version, code, n, d = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if version != 1:
            raise UserError(
                f"{self.idx_path}: version {version} of the format; 1 is the one that can be read"
            )
        if code not in _DTYPES:
            what = f"{_FLOATS[code]}, which are no token ids" if code in _FLOATS else "unknown"
            raise UserError(
                f"{self.idx_path}: dtype code {code} is {what}; allowed are"
                f" {', '.join(map(str, _DTYPES))}"
            )
        expected = _HEADER.size + 12 * n + 8 * d
        if index.size != expected:
            raise UserError(
                f"{self.idx_path}: {index.size} bytes, {n} sequences and {d} document indices need"
                f" {expected}"
            )
        self._dtype = np.dtype(_DTYPES[code])
        self._lengths = np.frombuffer(index, "<i4", n, _HEADER.size)
        self._pointers = np.frombuffer(index, "<i8", n, _HEADER.size + 4 * n)
        self._indices = np.frombuffer(index, "<i8", d, _HEADER.size + 12 * n)
        self.num_documents = max(0, int(d) - 1)
        end = self._check_sequences()
        self._check_documents()
        self._tokens = _mapped(self.bin_path, np.dtype("u1"))
        if self._tokens.size != end:
            raise UserError(f"{self.bin_path}: {self._tokens.size} bytes, its index ends at {end}")
        self._tokens = self._tokens.view(self._dtype)
        self.num_tokens = int(self._tokens.size)

    def runs(self, tokens: int = CHUNK) -> Iterator[tuple[int, I64, I64]]:
        """All documents in order, some at a time: the first, the ids (int64), and the length of
        each, which may be 0.

        Args:
            tokens: at most, in a run of several documents.
        """
        for first in range(0, self.num_documents, _DOCUMENTS):
            starts = self._starts(first, min(first + _DOCUMENTS, self.num_documents))
            low = 0
            while low < len(starts) - 1:
                high = max(
                    int(np.searchsorted(starts, starts[low] + tokens, side="right")) - 1, low + 1
                )
                flat = self._tokens[starts[low] : starts[high]].astype(np.int64)
                yield first + low, flat, np.diff(starts[low : high + 1])
                low = high

    def _starts(self, first: int, stop: int) -> I64:
        """Where documents first..stop-1 begin and the last one ends, in tokens [stop - first
        + 1].
        """
        sequences = self._indices[first : stop + 1].astype(np.int64)
        low, high = int(sequences[0]), int(sequences[-1])
        # a slice: numpy copies unaligned arrays whole
        pointers = self._pointers[low : high + 1].astype(np.int64) // self._dtype.itemsize
        if high == len(self._pointers):
            pointers = np.append(pointers, self.num_tokens)
        return pointers[sequences - low]

    def _check_sequences(self) -> int:
        """Whether sequences lie one after the other; returns where the last one ends, in bytes."""
        end = 0
        for first in range(0, len(self._lengths), CHUNK):
            lengths = self._lengths[first : first + CHUNK].astype(np.int64)
            ends = end + np.cumsum(lengths) * self._dtype.itemsize
            wrong = (lengths < 0) | (
                self._pointers[first : first + CHUNK] != np.concatenate([[end], ends[:-1]])
            )
            if wrong.any():
                raise UserError(
                    f"{self.idx_path}: sequence {first + int(np.argmax(wrong))} does not begin"
                    " where the one before it ends"
                )
            end = int(ends[-1])
        return end

    def _check_documents(self) -> None:
        """Whether documents are runs of sequences, first to last."""
        previous, n = 0, len(self._lengths)
        for first in range(0, len(self._indices), CHUNK):
            indices = self._indices[first : first + CHUNK].astype(np.int64)
            wrong = np.diff(indices, prepend=previous) < 0
            if first == 0:
                wrong[0] = indices[0] != 0
            if wrong.any():
                raise UserError(
                    f"{self.idx_path}: document index {first + int(np.argmax(wrong))} is out of"
                    " order"
                )
            previous = int(indices[-1])
        if previous != n:
            raise UserError(
                f"{self.idx_path}: its documents end at sequence {previous}, it has {n} sequences"
            )


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    try:
        return (
            np.asarray(np.memmap(path, dtype, mode="r"))
            if path.stat().st_size
            else np.empty(0, dtype)
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None

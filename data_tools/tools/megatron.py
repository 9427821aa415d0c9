"""Megatron's indexed datasets (.bin and .idx) as any tool may have written them, for import.

`llada.data.shard_reader` reads the same format, but is made for training, which reads a few bytes
at a time of files that our writer made: two dtypes, one sequence per document, EOS at the end, no
empty documents. Datasets of other tools may have any integer dtype, several sequences per document,
and documents without tokens. They are read once, from start to end, and every offset is checked
first, because there is no manifest with checksums. So this is a separate reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llada.arrays import I64, map_file
from llada.data.shard_format import CHUNK, HEADER, MAGIC, VERSION, index_parts
from llada.errors import UserError

_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
_DOCUMENTS_AT_ONCE = 1 << 16


class IndexedDataset:
    """One dataset, memory-mapped and checked.

    The index: magic, u64 version, u8 dtype code, u64 sequences n, u64 document indices d; then
    int32 lengths [n], int64 byte offsets [n], and int64 document indices [d]. Document k is
    sequences indices[k] to indices[k + 1] - 1: indices [0, 2, 2, 3] are three documents of two, no
    and one sequence.

    Args:
        path: path of either file, or of both without .bin and .idx.

    Attributes:
        bin_path: path of the token ids.
        idx_path: path of the index.
        num_documents: number of documents.
        num_tokens: number of token ids.

    Raises:
        UserError: a missing file; an index of another format, or that contradicts itself or the
            size of the token file.
    """

    def __init__(self, path: str | Path) -> None:
        base = str(path)
        if base.endswith((".bin", ".idx")):
            base = base[:-4]
        self.bin_path = Path(f"{base}.bin")
        self.idx_path = Path(f"{base}.idx")
        _check_exists(self.idx_path, self.bin_path)
        _check_exists(self.bin_path, self.idx_path)
        index = _map_bytes(self.idx_path)
        code, n, d = self._read_header(index)
        self._dtype = np.dtype(_DTYPES[code])
        # The header has 34 bytes, so these arrays are not aligned.
        parts = index_parts(n, d)
        self._lengths = np.frombuffer(index, "<i4", n, parts.lengths)
        self._pointers = np.frombuffer(index, "<i8", n, parts.pointers)
        self._indices = np.frombuffer(index, "<i8", d, parts.indices)
        self.num_documents = max(0, int(d) - 1)
        end = self._check_sequences()
        self._check_documents()
        data = _map_bytes(self.bin_path)
        if data.size != end:
            raise UserError(f"{self.bin_path}: {data.size} bytes, its index ends at {end}")
        self._tokens = data.view(self._dtype)
        self.num_tokens = int(self._tokens.size)

    def _read_header(self, index: npt.NDArray[np.uint8]) -> tuple[int, int, int]:
        """Return dtype code, number of sequences and number of document indices."""
        if index.size < HEADER.size or index[: len(MAGIC)].tobytes() != MAGIC:
            raise UserError(
                f"{self.idx_path}: not the index of a Megatron dataset (it does not begin with"
                f" {MAGIC[:7].decode()})"
            )
        _, version, code, n, d = HEADER.unpack(index[: HEADER.size].tobytes())
        if version != VERSION:
            raise UserError(
                f"{self.idx_path}: version {version} of the format; {VERSION} is the one that can"
                " be read"
            )
        if code not in _DTYPES:
            meaning = "unknown"
            if code in _FLOATS:
                meaning = f"{_FLOATS[code]}, which is not a dtype of token ids"
            raise UserError(
                f"{self.idx_path}: dtype code {code} is {meaning}; allowed are"
                f" {', '.join(map(str, _DTYPES))}"
            )
        expected = index_parts(n, d).end
        if index.size != expected:
            raise UserError(
                f"{self.idx_path}: {index.size} bytes, {n} sequences and {d} document indices need"
                f" {expected}"
            )
        return code, n, d

    def runs(self, tokens: int = CHUNK) -> Iterator[tuple[int, I64, I64]]:
        """Read all documents in order, in runs of several.

        Args:
            tokens: most tokens in a run of several documents.

        Yields:
            The first document of a run, the ids of its documents, int64 [tokens], and the length of
            each document, which may be 0, int64 [documents].
        """
        for first in range(0, self.num_documents, _DOCUMENTS_AT_ONCE):
            starts = self._starts(first, min(first + _DOCUMENTS_AT_ONCE, self.num_documents))
            low = 0
            while low < len(starts) - 1:
                # As many documents as fit into `tokens`, but at least one.
                fit = int(np.searchsorted(starts, starts[low] + tokens, side="right")) - 1
                high = max(fit, low + 1)
                flat = self._tokens[starts[low] : starts[high]].astype(np.int64)
                yield first + low, flat, np.diff(starts[low : high + 1])
                low = high

    def _starts(self, first: int, stop: int) -> I64:
        """Return where documents first..stop-1 begin and the last one ends, in tokens
        [stop - first + 1].
        """
        sequences = self._indices[first : stop + 1].astype(np.int64)
        low = int(sequences[0])
        high = int(sequences[-1])
        # Only the sequences that are needed: numpy copies an unaligned array as a whole.
        pointers = self._pointers[low : high + 1].astype(np.int64) // self._dtype.itemsize
        if high == len(self._pointers):
            # The last document ends with the file, for which there is no pointer.
            pointers = np.append(pointers, self.num_tokens)
        return pointers[sequences - low]

    def _check_sequences(self) -> int:
        """Check that each sequence begins where the one before it ends.

        Returns:
            Where the last one ends, in bytes.
        """
        end = 0
        for first in range(0, len(self._lengths), CHUNK):
            lengths = self._lengths[first : first + CHUNK].astype(np.int64)
            ends = end + np.cumsum(lengths) * self._dtype.itemsize
            begins = np.concatenate([[end], ends[:-1]])
            wrong = (lengths < 0) | (self._pointers[first : first + CHUNK] != begins)
            if wrong.any():
                # A wrong length shifts all sequences after it, so the first one is named.
                raise UserError(
                    f"{self.idx_path}: sequence {first + int(np.argmax(wrong))} does not begin"
                    " where the one before it ends"
                )
            end = int(ends[-1])
        return end

    def _check_documents(self) -> None:
        """Check that documents are runs of sequences, from the first to the last."""
        previous = 0
        num_sequences = len(self._lengths)
        for first in range(0, len(self._indices), CHUNK):
            indices = self._indices[first : first + CHUNK].astype(np.int64)
            wrong = np.diff(indices, prepend=previous) < 0
            if first == 0:
                # The first document begins with the first sequence.
                wrong[0] = indices[0] != 0
            if wrong.any():
                raise UserError(
                    f"{self.idx_path}: document index {first + int(np.argmax(wrong))} is out of"
                    " order"
                )
            previous = int(indices[-1])
        if previous != num_sequences:
            raise UserError(
                f"{self.idx_path}: its documents end at sequence {previous}, it has"
                f" {num_sequences} sequences"
            )


def _check_exists(file: Path, other: Path) -> None:
    if not file.is_file():
        raise UserError(
            f"{file}: no such file; a dataset is a .bin and the .idx of the same name beside it"
            f" ({other.name})"
        )


def _map_bytes(path: Path) -> npt.NDArray[np.uint8]:
    """Map a file into memory. Raises UserError if it cannot be read."""
    try:
        return map_file(path, np.dtype(np.uint8))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None

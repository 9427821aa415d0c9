"""Exact duplicates in a whole corpus, with bounded memory: the first copy in input order is kept.

Every unit of work writes the sorted 128-bit hashes of its documents. Then the hashes of all units
are merged range by range, each small enough for memory. This gives the documents of the range that
repeat an earlier one, and the units leave them out when they are tokenized.

With 128 bits, ten billion documents have a chance of 1e-19 that two different ones share a hash.
"""

from __future__ import annotations

import bisect
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.types import Advance
from llada.arithmetic import ceil_div
from llada.arrays import U64

HASHES = "hashes"
"""Folder of the hashes of units, in an unfinished preparation."""
DUPLICATES = "duplicates"
"""Folder of the duplicates that the merges wrote."""
ROWS_AT_ONCE = 1 << 24
"""Most hashes merged at a time: 400 MB, and as much again while they are sorted."""
_NUM_UPPER_HALVES = 1 << 64
"""Number of values of the upper half of a hash, by which ranges are cut."""
_NPY_HEADER_BYTES = 128


# -- hashes of a unit ------------------------------------------------------------------------------


def hashes_path(folder: Path, unit: int) -> Path:
    """Return the file with the hashes of a unit."""
    return folder / HASHES / f"{unit:05d}.npy"


def write_hashes(path: Path, digests: Sequence[bytes]) -> None:
    """Write the hashes of a unit, sorted.

    The file contains three rows of uint64 [3, documents]: the upper and the lower half of each
    hash, and the number of the document in the unit.

    Args:
        path: path from `hashes_path`.
        digests: hash of each document, of 16 bytes, in order.
    """
    halves = np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    # The last key is the primary one. The sort is stable: equal hashes stay in document order.
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    _save(path, np.stack([halves[order, 0], halves[order, 1], order.astype(np.uint64)]))


# -- merging ---------------------------------------------------------------------------------------


def num_ranges(folder: Path, units: int) -> int:
    """Return the number of ranges of hashes, which are merged one by one."""
    documents = 0
    for unit in range(units):
        documents += _open(hashes_path(folder, unit)).shape[1]
    return max(1, ceil_div(documents, ROWS_AT_ONCE))


def range_path(folder: Path, number: int) -> Path:
    """Return the file with the duplicates of a range."""
    return folder / DUPLICATES / f"{number:05d}.npy"


@dataclass(frozen=True)
class MergeJob:
    """Merges ranges of hashes, in any process that sees its folder.

    Attributes:
        folder: folder of the unfinished preparation.
        units: number of its units.
        ranges: number of ranges, from `num_ranges`.
    """

    folder: Path
    units: int
    ranges: int

    def merge_range(self, number: int, advance: Advance) -> None:
        """Write the duplicates of a range: two rows of uint64, unit and document [2, duplicates],
        sorted. They are reported as documents left out.
        """
        upper, lower, units, documents = self._read_range(number)
        by_hash = np.lexsort((lower, upper))
        # Equal hashes come in input order, and the sort is stable: the first of them is the
        # earliest document, and every hash that equals the one before it is that of a copy.
        same_upper = np.diff(upper[by_hash]) == 0
        same_lower = np.diff(lower[by_hash]) == 0
        copies = by_hash[1:][same_upper & same_lower]
        copied_units = units[copies]
        copied_documents = documents[copies]
        by_document = np.lexsort((copied_documents, copied_units))
        duplicates = np.stack([copied_units[by_document], copied_documents[by_document]])
        _save(range_path(self.folder, number), duplicates)
        advance(0, 0, len(copies))

    def _read_range(self, number: int) -> U64:
        """Return the hashes of a range, in the order of units: upper half, lower half, unit and
        document [4, hashes].
        """
        low = self._lower_bound(number)
        high = self._lower_bound(number + 1)
        parts = [np.empty((4, 0), dtype=np.uint64)]
        for unit in range(self.units):
            rows = _open(hashes_path(self.folder, unit))
            start = _first_at_least(rows[0], low)
            stop = _first_at_least(rows[0], high)
            if start < stop:
                upper, lower, document = rows[:, start:stop]
                units = np.full(stop - start, unit, dtype=np.uint64)
                parts.append(np.stack([upper, lower, units, document]))
        return np.concatenate(parts, axis=1)

    def _lower_bound(self, number: int) -> int:
        """Return the first upper half of a hash in a range, which is number / ranges of 2^64."""
        return ceil_div(number * _NUM_UPPER_HALVES, self.ranges)


class Duplicates:
    """The documents that repeat an earlier one, as the merges wrote them.

    Args:
        folder: folder of the unfinished preparation.
    """

    def __init__(self, folder: Path) -> None:
        self._files = sorted((folder / DUPLICATES).glob("[0-9]*.npy"))

    def of(self, unit: int) -> set[int]:
        """Return the numbers of the documents of a unit that repeat an earlier one."""
        documents: set[int] = set()
        for file in self._files:
            rows = _open(file)
            start = _first_at_least(rows[0], unit)
            stop = _first_at_least(rows[0], unit + 1)
            documents.update(rows[1, start:stop].tolist())
        return documents


# -- files -----------------------------------------------------------------------------------------


def _first_at_least(ordered: U64, value: int) -> int:
    """Return the index of the first element that is not less than `value`.

    Elements are compared as Python ints: numpy would compare a uint64 with 2^64 as floats. Of a
    memory-mapped array, only the pages that the search touches are read.
    """
    return bisect.bisect_left(ordered, value, key=int)


def _open(path: Path) -> U64:
    if path.stat().st_size > _NPY_HEADER_BYTES:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    # An array without elements cannot be mapped.
    return np.asarray(np.load(path, allow_pickle=False))


def _save(path: Path, array: U64) -> None:
    """Write a file that appears complete or not at all, even if several tasks write it at once."""
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    with open(partial, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)

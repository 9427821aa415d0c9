"""Exact duplicates over a whole corpus with bounded memory: the first copy in input order stays.

Every unit of work writes the 128-bit hashes of its documents, sorted. Then the hashes of all units
are merged one range at a time, each small enough for memory, which gives the documents of the range
that repeat an earlier one. When units are tokenized they leave those out.

With 128 bits, ten billion documents have a chance of 1e-19 that two different ones share a hash.
"""

from __future__ import annotations

import bisect
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from llada.arithmetic import ceil_div

U64 = npt.NDArray[np.uint64]

# As in data_tools.job.pool, whose processes merge.
Advance: TypeAlias = Callable[[int, int, int], None]

HASHES = "hashes"
DUPLICATES = "duplicates"
"""Folders of an unfinished preparation: hashes of units, and what the merges found."""
ROWS_AT_ONCE = 1 << 24
"""Hashes merged at a time: 400 MB, and as much again while they are sorted."""
_HASH_RANGE = 1 << 64
"""Ranges are cut by the upper half of a hash."""
_NPY_HEADER_BYTES = 128


# -- hashes of a unit ------------------------------------------------------------------------------


def hashes_path(folder: Path, unit: int) -> Path:
    """Return the file with the hashes of a unit."""
    return folder / HASHES / f"{unit:05d}.npy"


def write_hashes(path: Path, digests: Sequence[bytes]) -> None:
    """Write the hashes of a unit, sorted.

    The file holds three rows of uint64 [3, documents]: the upper and the lower half of each hash,
    and the number of the document in the unit.

    Args:
        path: from `hashes_path`.
        digests: 16 bytes for each document, in order.
    """
    halves = np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    # Sorts by the last key first, and is stable: equal hashes stay in order of their documents.
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
    """Return the file with the duplicates that the merge of a range found."""
    return folder / DUPLICATES / f"{number:05d}.npy"


@dataclass(frozen=True)
class MergeJob:
    """Merges ranges of hashes. It is sent to worker processes, each of which does some ranges.

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
        sorted. `advance` gets their number last, as documents left out.
        """
        rows = self._read_range(number)
        order = np.lexsort((rows[1], rows[0]))
        # Rows come in input order and the sort is stable, so of equal hashes the first is the
        # earliest document. Every row that equals the one before it is a copy.
        is_copy = (np.diff(rows[0, order]) == 0) & (np.diff(rows[1, order]) == 0)
        copies = rows[2:, order[1:][is_copy]]
        by_document = np.lexsort((copies[1], copies[0]))
        _save(range_path(self.folder, number), copies[:, by_document])
        advance(0, 0, copies.shape[1])

    def _read_range(self, number: int) -> U64:
        """Return the hashes of a range of all units in order: upper half, lower half, unit and
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
        """Return the upper half of a hash with which a range begins: number / ranges of 2^64."""
        return min(ceil_div(number * _HASH_RANGE, self.ranges), _HASH_RANGE)


class Duplicates:
    """The documents that repeat an earlier one, read from what the merges wrote.

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

    numpy would compare a uint64 with a Python int of 2^64 as floats, so elements become Python
    ints; of a memory-mapped array only the pages that the search touches are read.
    """
    return bisect.bisect_left(ordered, value, key=int)


def _open(path: Path) -> U64:
    if path.stat().st_size > _NPY_HEADER_BYTES:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    # An array without elements cannot be mapped.
    return np.asarray(np.load(path, allow_pickle=False))


def _save(path: Path, array: U64) -> None:
    """Write a file that appears complete or not at all, whoever else writes it at the same time."""
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    with open(partial, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)

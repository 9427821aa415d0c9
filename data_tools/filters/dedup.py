"""Exact duplicates over a whole corpus with bounded memory: the first copy in input order stays.

Every unit writes the 128-bit hashes of its documents, sorted. Then ranges of hashes are merged one
at a time, each small enough for memory, over all units, which gives the documents of each range
that repeat an earlier one. When units are tokenized they leave those out. (With 128 bits, ten
thousand million documents have a chance of 1e-19 that two different ones share a hash.)
"""

from __future__ import annotations

import bisect
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
HASHES, DUPLICATES = "hashes", "duplicates"
ROWS_AT_ONCE = 1 << 24
"""Hashes merged at a time: 400 MB, and as much again while they are sorted."""


def hashes_path(folder: Path, unit: int) -> Path:
    """The hashes of a unit."""
    return folder / HASHES / f"{unit:05d}.npy"


def write_hashes(path: Path, digests: Sequence[bytes]) -> None:
    """Three rows of uint64 [3, documents], sorted: the upper and the lower half of each hash, and
    the document's number in the unit.
    """
    halves = np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal ones stay in order
    _save(path, np.stack([halves[order, 0], halves[order, 1], order.astype(np.uint64)]))


def num_ranges(folder: Path, units: int) -> int:
    """Ranges of hashes that are merged one by one."""
    documents = sum(_open(hashes_path(folder, unit)).shape[1] for unit in range(units))
    return max(1, -(-documents // ROWS_AT_ONCE))


def range_path(folder: Path, number: int) -> Path:
    """What the merge of a range leaves."""
    return folder / DUPLICATES / f"{number:05d}.npy"


@dataclass(frozen=True)
class MergeJob:
    """Merges the hashes of one range after the other.

    Attributes:
        folder: of the unfinished preparation.
        units: it has.
        ranges: of hashes.
    """

    folder: Path
    units: int
    ranges: int

    def merge_range(self, number: int, advance: Callable[[int, int, int], None]) -> None:
        """Write the documents of a range that repeat an earlier one; `advance` gets their number
        last, as documents left out.
        """
        low, high = (min(-(-(n << 64) // self.ranges), (1 << 64)) for n in (number, number + 1))
        parts = list(self._parts(low, high))
        rows = np.concatenate(parts, axis=1) if parts else np.empty((4, 0), dtype=np.uint64)
        del parts
        order = np.lexsort((rows[1], rows[0]))
        same = (np.diff(rows[0, order]) == 0) & (np.diff(rows[1, order]) == 0)
        repeated = rows[2:, order[1:][same]]
        _save(range_path(self.folder, number), repeated[:, np.lexsort((repeated[1], repeated[0]))])
        advance(0, 0, repeated.shape[1])

    def _parts(self, low: int, high: int) -> Iterator[U64]:
        """Hashes of the range, their unit and number: of all units in order, so that of equal ones
        the first is the one to keep.
        """
        for unit in range(self.units):
            rows = _open(hashes_path(self.folder, unit))
            start, stop = (bisect.bisect_left(rows[0], bound, key=int) for bound in (low, high))
            if start < stop:
                part = rows[:, start:stop]
                yield np.stack(
                    [part[0], part[1], np.full(stop - start, unit, dtype=np.uint64), part[2]]
                )


class Duplicates:
    """What the merges found."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted((folder / DUPLICATES).glob("[0-9]*.npy"))

    def of(self, unit: int) -> set[int]:
        """Numbers of the documents of a unit that repeat an earlier one."""
        found: set[int] = set()
        for file in self._files:
            rows = _open(file)
            start, stop = (
                bisect.bisect_left(rows[0], bound, key=int) for bound in (unit, unit + 1)
            )
            found.update(rows[1, start:stop].tolist())
        return found


def _open(path: Path) -> npt.NDArray[Any]:
    # An array without elements cannot be mapped.
    array = (
        np.load(path, mmap_mode="r", allow_pickle=False)
        if path.stat().st_size > 128
        else np.load(path, allow_pickle=False)
    )
    return np.asarray(array)


def _save(path: Path, array: U64) -> None:
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    with open(partial, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)

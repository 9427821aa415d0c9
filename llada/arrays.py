"""Types of numpy arrays, and arrays that are files."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]
Number = TypeVar("Number", bound=np.generic)


def map_file(path: Path, dtype: np.dtype[Number]) -> npt.NDArray[Number]:
    """Map a file of numbers into memory, read-only. Raises OSError if it cannot be read."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.asarray(np.memmap(path, dtype, mode="r"))

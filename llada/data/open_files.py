"""Files that stay open between reads, for the shards of a training run."""

from __future__ import annotations

import os
import resource
import weakref
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llada.arrays import Number
from llada.data.shard_format import damaged, unreadable

_MAX_OPEN_FILES = 32768
"""Most files that stay open, whatever the system allows."""


class OpenFile:
    """A file that stays open as long as this object lives.

    It is read by position and not through a memory map: a read lets other threads run while it
    waits for the disk, a failing disk is an exception and not a signal, and what was read does not
    count as memory of this process.

    Attributes:
        path: path of the file.
        size: bytes it had when it was opened.

    Raises:
        UserError: the file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            self.size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise unreadable(self.path, error) from None

    def read(self, dtype: np.dtype[Number], count: int, offset: int) -> npt.NDArray[Number]:
        """Read `count` numbers from byte `offset` on into a new array.

        Raises:
            UserError: the disk fails, or the file ends too early.
        """
        out = np.empty(count, dtype)
        unread = out.view(np.uint8).data
        # A single read may return less than it was asked for (at most 2 GiB on Linux).
        while unread:
            try:
                num_bytes = os.preadv(self._descriptor, [unread], offset)
            except OSError as error:
                raise unreadable(self.path, error) from None
            if not num_bytes:
                raise damaged(self.path, f"it ends at byte {offset}")
            unread = unread[num_bytes:]
            offset += num_bytes
        return out


class OpenFiles:
    """A cache of open files, which closes the least recently used.

    Threads may share it. A file that a thread is reading stays open until that read is done.

    Args:
        capacity: number of files that stay open; None for a quarter of those that this process may
            open.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity or _default_capacity()
        self.get = lru_cache(maxsize=self.capacity)(OpenFile)


def _default_capacity() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # RLIM_INFINITY is -1.
    if limit < 0:
        return _MAX_OPEN_FILES
    return min(max(1, limit // 4), _MAX_OPEN_FILES)

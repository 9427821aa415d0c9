"""Locks by which processes know that others use a file."""

from __future__ import annotations

import fcntl
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def lock_shared(path: Path) -> BinaryIO:
    """Open a file with a lock that any number of processes may share while they keep it open.

    On a file system without locks, the file is opened without one.
    """
    # Opened for writing, because locks on network file systems need that.
    file = open(path, "r+b")  # noqa: SIM115 (the caller closes it)
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def is_only_holder(file: BinaryIO) -> bool:
    """Return whether no other process is known to hold a lock on an open file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return True
    return True


def is_locked(path: Path) -> bool:
    """Return whether a process is known to hold a lock on a file."""
    with open(path, "r+b") as file:
        return not is_only_holder(file)

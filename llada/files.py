"""Files that are durable and complete: flushed to disk, written atomically, checked by checksum.

llada.outputs builds on this: the files and folders that a user names as a command's output.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

_CHUNK = 1 << 24
"""Bytes read at once, 16 MiB."""
_FLUSH_INTERVAL = 0.2
"""Seconds between two flushes in the background."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors where there is no room for what is written."""
T = TypeVar("T")


# -- reading ---------------------------------------------------------------------------------------


def read_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files in a folder, without its subfolders."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def checksum(path: Path) -> dict[str, Any]:
    """Size in bytes (`bytes`) and xxh3_64 in hexadecimal (`xxh3`) of a file."""
    # Here, not above: the batch job imports this module with the standard library alone.
    import xxhash

    digest = xxhash.xxh3_64()
    size = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return {"bytes": size, "xxh3": digest.hexdigest()}


# -- writing ---------------------------------------------------------------------------------------


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file that readers see either complete or not at all.

    After an error nothing of it is left.
    """
    if isinstance(content, str):
        content = content.encode("utf-8")
    # A random name: another process may be writing the same file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            # Before the rename: otherwise a crash could leave the new name on an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)  # the rename itself is an entry of the folder


def write_json(path: Path, content: object, indent: int | None = None) -> None:
    """Write a small JSON file that readers see either complete or not at all."""
    write_atomically(path, json.dumps(content, indent=indent))


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to disk: names added, removed or renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


# -- in the background -----------------------------------------------------------------------------


def prefetch(calls: Iterable[Callable[[], T]], depth: int = 2) -> Iterator[T]:
    """Results of `calls` in their order, computed by a thread up to `depth` calls ahead.

    Results that nobody asks for any more are given up without waiting for the thread.
    """
    pool = ThreadPoolExecutor(1)
    try:
        pending: deque[Future[T]] = deque()
        for call in calls:
            pending.append(pool.submit(call))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # The garbage collector may run this anywhere, also where a thread that is just starting
        # holds a lock of the threading module. Joining a thread takes that lock too: a deadlock.
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def flush_in_background(folder: Path) -> Iterator[None]:
    """Flush the files in `folder` to disk while the block writes them.

    Otherwise the system keeps large files in memory, and the flush at the end waits for all of it.

    Raises:
        OSError: at the end of the block, if the disk failed. The system reports such an error only
            once, so a later flush of the same file might succeed.
    """
    ended = threading.Event()
    errors: list[OSError] = []

    def flush() -> None:
        while not ended.wait(_FLUSH_INTERVAL) and not errors:
            for path in folder.iterdir():
                try:
                    with open(path, "rb") as file:
                        os.fdatasync(file.fileno())
                except FileNotFoundError:  # renamed since it was listed
                    continue
                except OSError as error:
                    errors.append(error)

    thread = threading.Thread(target=flush, name="flush", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if errors:
        raise errors[0]

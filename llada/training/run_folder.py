"""The folder of a run: created, held by one run at a time, and named when it cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llada.checkpoint.names import MARKER
from llada.data.manifest import MANIFEST
from llada.engine.layout import gather_world
from llada.errors import RunError, TryAgain, UserError
from llada.files import DISK_FULL, sync_folder
from llada.formatting import readable_size
from llada.training.lock import RunLock

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_FOREIGN = {
    MANIFEST: "a prepared corpus",
    "config.json": "a Hugging Face folder",
    MARKER: "a checkpoint",
}
"""File -> what the folder is that contains it, none of which is a run's."""


class RunFolder:
    """A run folder that this process alone writes to, until `release`.

    Args:
        path: the run folder, which is created if it is missing.
        stopped: true once this process is asked to stop, which ends the waiting for another one.

    Raises:
        UserError: the folder cannot be created or written, is something else than a run's, or is
            held by another process.
        RunError: the disk is full or fails.
        TryAgain: asked to stop while waiting.
    """

    def __init__(self, path: Path, stopped: Callable[[], bool]) -> None:
        refuse_foreign_folder(path)
        self._created = _create(path)
        try:
            with name_write_errors(path):
                self._lock = RunLock(path, stopped=stopped)
        except BaseException:
            self._remove_empty()
            raise

    def release(self) -> None:
        """Let others use the folder; one that was created here and is still empty is removed."""
        self._lock.release()
        self._remove_empty()

    def _remove_empty(self) -> None:
        for folder in reversed(self._created):
            with suppress(OSError):  # it is not empty any more
                folder.rmdir()


def hold_run_folder(path: Path, rank: int, stopped: Callable[[], bool]) -> RunFolder | None:
    """Hold the run folder on rank 0, while the others wait; collective.

    Args:
        path: the run folder.
        rank: this process's rank.
        stopped: see RunFolder.

    Returns:
        What rank 0 has to release; None on the others.

    Raises:
        UserError, RunError, TryAgain: what rank 0 met (see RunFolder), on every rank.
    """
    held: RunFolder | None = None
    error: UserError | RunError | TryAgain | None = None
    if rank == 0:
        try:
            held = RunFolder(path, stopped)
        except (UserError, RunError, TryAgain) as caught:
            error = caught
    # The exchange is also what the other ranks wait in.
    error = gather_world(error)[0]
    if error is not None:
        raise error
    return held


def refuse_foreign_folder(path: Path) -> None:
    """Raise UserError if a folder is something else than a run's, or lies in a corpus."""
    for name, description in _FOREIGN.items():
        if os.path.exists(path / name):
            raise UserError(
                f"run.dir: '{path}' is {description} (it contains {name}); choose another folder"
            )
    # A run inside a corpus would become part of what is read and checked.
    for parent in path.resolve().parents:
        if (parent / MANIFEST).is_file() and (parent / "tokenizer").is_dir():
            raise UserError(
                f"run.dir: '{path}' lies in {parent}, a prepared corpus, which is only read; choose"
                " a folder outside"
            )


@contextmanager
def name_write_errors(path: Path) -> Iterator[None]:
    """Turn a system's error while the block writes to a run folder into one clear line.

    Raises:
        UserError: the folder may not be written.
        RunError: the disk is full or fails, or the folder is gone.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the console's lines is gone; the folder is sound
    except OSError as error:
        if not os.path.isdir(path):
            raise RunError(
                f"run.dir: '{path}' is gone: it was moved or deleted, or its file system is no"
                " longer mounted"
            ) from error
        reason = error.strerror or str(error)
        if error.errno in _FORBIDDEN:
            raise UserError(
                f"run.dir: '{path}' cannot be written ({reason}); choose a folder that can be"
                " written"
            ) from error
        if error.errno in DISK_FULL:
            reason += f"; {readable_size(shutil.disk_usage(path).free)} are left"
        raise RunError(f"run.dir: '{path}' cannot be written ({reason})") from error


def _create(path: Path) -> list[Path]:
    """Create a folder and its missing parents; return those created, the outermost first."""
    created = []
    try:
        for folder in reversed([path, *path.parents]):
            if not os.path.isdir(folder):
                folder.mkdir(exist_ok=True)  # another process may be creating it too
                created.append(folder)
                sync_folder(folder.parent)
    except OSError as error:
        for folder in reversed(created):
            with suppress(OSError):
                folder.rmdir()
        raise UserError(
            f"run.dir: '{path}' cannot be created ({error.strerror}); choose a writable folder"
        ) from None
    return created

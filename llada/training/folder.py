"""The folder of a run: made, held by one run at a time, and named when it cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llada.checkpoint.format import MARKER
from llada.data.corpus import MANIFEST
from llada.engine.layout import gather_world
from llada.errors import RunError, TryAgain, UserError
from llada.files import DISK_FULL, readable_size, sync_folder
from llada.training.lock import RunLock

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_OTHERS = {
    MANIFEST: "a prepared corpus",
    "config.json": "a Hugging Face folder",
    MARKER: "a checkpoint",
}
"""Files that tell folders which are no run's."""


class RunFolder:
    """A run folder that this process alone writes to, until `release`.

    Args:
        path: of the folder, which is made where it is missing.
        stopped: true once this process is asked to stop, which ends the waiting for another one.

    Raises:
        UserError: a folder that cannot be made or written, one that is something else than a run's,
            or that another process holds.
        RunError: the disk is full or fails.
        TryAgain: asked to stop while waiting.
    """

    def __init__(self, path: Path, stopped: Callable[[], bool]) -> None:
        refuse_others(path)
        self._made = _make(path)
        try:
            with naming(path):
                self._lock = RunLock(path, stopped=stopped)
        except BaseException:
            self._remove_empty()
            raise

    def release(self) -> None:
        """Let others use the folder; where nothing was written into it, it is removed as it was
        made.
        """
        self._lock.release()
        self._remove_empty()

    def _remove_empty(self) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # something is in it by now
                folder.rmdir()


def hold(path: Path, rank: int, stopped: Callable[[], bool]) -> RunFolder | None:
    """Hold the run folder on rank 0, while the others wait; collective.

    Args:
        path: of the folder.
        rank: of this process.
        stopped: see RunFolder.

    Returns:
        What rank 0 has to release; None on the others.

    Raises:
        UserError, RunError, TryAgain: what rank 0 met (see RunFolder), on every rank.
    """
    held: RunFolder | None = None
    problem: UserError | RunError | TryAgain | None = None
    if rank == 0:
        try:
            held = RunFolder(path, stopped)
        except (UserError, RunError, TryAgain) as error:
            problem = error
    problem = gather_world(problem)[0]
    if problem is not None:
        raise problem
    return held


def refuse_others(path: Path) -> None:
    """Raises UserError for a folder that is something else than a run's."""
    for name, what in _OTHERS.items():
        if os.path.exists(path / name):
            raise UserError(f"run.dir: '{path}' is {what} (it holds {name}); choose another folder")
    for above in path.resolve().parents:
        if (above / MANIFEST).is_file() and (above / "tokenizer").is_dir():
            raise UserError(
                f"run.dir: '{path}' lies in {above}, a prepared corpus, which is only read; choose"
                " a folder outside"
            )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn a system's error while the block writes to a run folder into one line that names the
    folder and the reason.

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
                f"run.dir: '{path}' is gone: it was moved or deleted, or its disk is away"
            ) from error
        reason = error.strerror or str(error)
        if error.errno in _FORBIDDEN:
            raise UserError(
                f"run.dir: '{path}' cannot be written ({reason}); choose a folder that can be"
                " written"
            ) from error
        left = (
            f"; {readable_size(shutil.disk_usage(path).free)} are left"
            if error.errno in DISK_FULL
            else ""
        )
        raise RunError(f"run.dir: '{path}' cannot be written ({reason}{left})") from error


def _make(path: Path) -> list[Path]:
    """Make a folder and those above it; returns the ones that were missing, the outermost first."""
    made = []
    try:
        for folder in [path, *path.parents][::-1]:
            if not os.path.isdir(folder):
                folder.mkdir(exist_ok=True)  # another process may be making it too
                made.append(folder)
                sync_folder(folder.parent)
    except OSError as error:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        raise UserError(
            f"run.dir: '{path}' cannot be made ({error.strerror}); choose a folder that can be"
            " written"
        ) from None
    return made

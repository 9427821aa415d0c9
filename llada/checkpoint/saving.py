"""One checkpoint on its way to disk, over all ranks.

A save has three phases. Rank 0 creates the temporary folder; every rank writes its part of the
engine's state, perhaps while training goes on; then the metadata and the marker are written and the
folder gets its name. Where a phase fails on one rank, every rank raises the same error, and no rank
waits for one that is gone.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from llada.checkpoint.format import CheckpointState, begin_checkpoint, commit_checkpoint
from llada.checkpoint.names import PARTIAL_SUFFIX, checkpoint_name
from llada.errors import RunError, one_line
from llada.files import DISK_FULL
from llada.formatting import readable_size
from llada.types import JsonObject

T = TypeVar("T")

_PROBE = bytes(1 << 20)
"""What is written to a disk to test whether it accepts more data."""


class PendingSave(Protocol):
    """An engine's save in progress on this rank.

    Attributes:
        error: what went wrong on this rank, once done.
        files: {"bytes", "xxh3"} of every file this rank wrote, by name, once done.
    """

    error: BaseException | None
    files: dict[str, JsonObject]

    def done(self) -> bool:
        """Return whether this rank has written its files."""
        ...

    def wait(self) -> None:
        """Wait until this rank has written its files."""
        ...

    def finish(self) -> None:
        """Write what belongs to all ranks; collective, once every rank is done without an error."""
        ...


class SavingEngine(Protocol):
    """What a save needs of an engine. Both methods are collective."""

    def gather(self, value: T) -> list[T]:
        """Return a small picklable value of every rank, on every rank."""
        ...

    def start_save(self, folder: Path) -> PendingSave:
        """Start to write the engine's state into an existing empty folder."""
        ...


class CheckpointSave:
    """A checkpoint that is being written; created and finished on all ranks together.

    Args:
        root: RUN/checkpoints.
        state: the run's state.
        tokenizer: files of the tokenizer, name -> content; rank 0 alone needs them.
        size: approximate size of a whole checkpoint in bytes, for messages.
        engine: engine whose state is saved.
        rank: this process's rank.

    Raises:
        RunError: the checkpoint cannot be written; what was written of it is removed, and earlier
            checkpoints stay.
    """

    def __init__(
        self,
        root: Path,
        state: CheckpointState,
        tokenizer: Mapping[str, bytes],
        size: int,
        engine: SavingEngine,
        rank: int,
    ) -> None:
        self._root = root
        self._state = state
        self._tokenizer = tokenizer
        self._size = size
        self._engine = engine
        self._rank = rank
        self._partial = root / f"{checkpoint_name(state.step)}{PARTIAL_SUFFIX}"
        self._run_on_rank_0(lambda: begin_checkpoint(root, state.step))
        self._pending = self._run_collective(lambda: engine.start_save(self._partial / "model"))

    @property
    def step(self) -> int:
        """Steps done in the state that is saved."""
        return self._state.step

    def done(self) -> bool:
        """Return whether this rank has written its part."""
        return self._pending.done()

    def finish(self) -> Path:
        """Wait for every rank and complete the checkpoint; collective.

        Returns:
            The checkpoint's folder.
        """
        self._run_on_every_rank(self._wait)
        self._run_collective(self._pending.finish)
        # Rank 0 writes the marker, with the checksums that each rank computed while writing.
        checksums: dict[str, JsonObject] = {}
        for files in self._engine.gather(self._pending.files):
            checksums |= files
        self._run_on_rank_0(
            lambda: commit_checkpoint(self._partial, self._state, self._tokenizer, checksums)
        )
        return self._partial.with_name(checkpoint_name(self._state.step))

    def _wait(self) -> None:
        self._pending.wait()
        if self._pending.error is not None:
            raise self._pending.error

    # -- one failure ends the save on all ranks ----------------------------------------------------

    def _run_on_rank_0(self, work: Callable[[], object]) -> None:
        """Run work on rank 0; if it fails, all ranks raise."""
        if self._rank != 0:
            work = _do_nothing
        self._run_on_every_rank(work)

    def _run_on_every_rank(self, work: Callable[[], object]) -> None:
        """Run work without communication on this rank; if it fails on any rank, all raise."""
        # Every rank takes part in the exchange, whether its work failed or not.
        failure: str | None = None
        try:
            work()
        except Exception as error:  # file systems and the writer raise many types
            failure = self._reason(error)
        for rank, reason in enumerate(self._engine.gather(failure)):
            if reason is not None:
                self._fail(rank, reason)

    def _run_collective(self, work: Callable[[], T]) -> T:
        """Run work in which the ranks wait for each other, and return its result.

        A rank that fails raises at once and tells the others nothing: they stop waiting when it
        exits.
        """
        try:
            return work()
        except Exception as error:
            self._fail(self._rank, self._reason(error))

    def _fail(self, rank: int, reason: str) -> NoReturn:
        if self._rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        raise RunError(
            f"checkpoint after step {self._state.step}: {self._root} cannot be written on rank"
            f" {rank} ({reason}); earlier checkpoints are unchanged"
        )

    def _reason(self, error: Exception) -> str:
        """Describe an error by the operating system's reason, if it reported one."""
        cause = find_system_error(error, self._root)
        if cause is None:
            return _one_line(error)
        run = self._root.parent
        if not run.is_dir():
            return (
                f"{run} is gone: it was moved or deleted, or its file system is no longer mounted"
            )
        reason = cause.strerror or _one_line(cause)
        if cause.errno in DISK_FULL:
            needed = readable_size(self._size)
            free = readable_size(shutil.disk_usage(run).free)
            reason += f": a checkpoint needs about {needed}, {free} are left"
        return reason


def find_system_error(error: BaseException, folder: Path) -> OSError | None:
    """Return the operating system's error behind a failed write into `folder`.

    torch's writer of tensors hides the system's error behind a message of its own ("enforce fail at
    inline_container.cc"). In that case a file is written to the same disk to provoke the error
    again.

    Returns:
        The system's error; None if the system did not fail.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    probe = folder / f"probe.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(probe, "wb", buffering=0) as file:
            written = 0
            while written < len(_PROBE):  # an unbuffered write may take a part only
                written += file.write(_PROBE[written:])
            os.fsync(file.fileno())
    except OSError as system_error:
        return system_error
    finally:
        probe.unlink(missing_ok=True)
    return None


def _do_nothing() -> None:
    return


def _one_line(error: Exception) -> str:
    return one_line(error)[:300] or type(error).__name__

"""One checkpoint of a run on its way to disk, over all ranks."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from llada.checkpoint import format
from llada.engine.base import Engine
from llada.errors import RunError
from llada.files import readable_size
from llada.training.folder import FULL

_PROBE = bytes(1 << 20)


class Saving:
    """A checkpoint that is being written; created and finished on all ranks together.

    Args:
        root: RUN/checkpoints.
        state: of the run.
        tokenizer: files of the tokenizer, name -> content.
        size: bytes of a whole checkpoint, nearly; for messages.
        engine: whose state is saved.

    Raises:
        RunError: it cannot be written; what was written of it is removed, earlier checkpoints stay.
    """

    def __init__(
        self,
        root: Path,
        state: format.State,
        tokenizer: Mapping[str, bytes],
        size: int,
        engine: Engine,
    ) -> None:
        self._state, self._tokenizer, self._size, self._engine = state, tokenizer, size, engine
        self._partial = root / f"{format.name(state.step)}.partial"
        self._together(self._begin if engine.parallel_rank.is_main else None)
        self._collective(self._start)

    @property
    def step(self) -> int:
        """Steps done in the state that is saved."""
        return self._state.step

    def _begin(self) -> None:
        format.begin(self._partial.parent, self._state.step)

    def _start(self) -> None:
        self._pending = self._engine.start_save(self._partial / "model")

    def written(self) -> bool:
        """Whether this rank has written its part."""
        return self._pending.done()

    def finish(self) -> Path:
        """Wait for every rank, then complete the checkpoint; its folder."""
        self._together(self._wait)
        self._collective(self._pending.finish)
        written = {
            name: entry
            for files in self._engine.gather(self._pending.files)
            for name, entry in files.items()
        }
        self._together(
            (lambda: self._commit(written)) if self._engine.parallel_rank.is_main else None
        )
        return self._partial.with_name(format.name(self._state.step))

    def _wait(self) -> None:
        self._pending.wait()
        if self._pending.error is not None:
            raise self._pending.error

    def _commit(self, written: dict[str, dict[str, object]]) -> None:
        format.commit(self._partial, self._state, self._tokenizer, written)

    def _together(self, work: Callable[[], object] | None) -> None:
        """Do this rank's part of work without communication; if any rank failed, all raise, and
        none waits for one that is gone.
        """
        problem: str | None = None
        try:
            if work is not None:
                work()
        except Exception as error:  # whatever a file system or the writer makes of it
            problem = self._reason(error)
        problems = [
            (rank, text)
            for rank, text in enumerate(self._engine.gather(problem))
            if text is not None
        ]
        if problems:
            self._fail(*problems[0])

    def _collective(self, work: Callable[[], object]) -> None:
        """Do work in which the ranks wait for each other: a rank that fails leaves at once, which
        ends the others' waiting.
        """
        try:
            work()
        except Exception as error:
            self._fail(self._engine.parallel_rank.rank, self._reason(error))

    def _reason(self, error: Exception) -> str:
        root = self._partial.parent
        cause = system_error(error, root)
        if cause is None:
            return _one_line(error)
        if not root.parent.is_dir():
            return f"{root.parent} is gone: it was moved or deleted, or its disk is away"
        reason = cause.strerror or _one_line(cause)
        if cause.errno in FULL:
            left = readable_size(shutil.disk_usage(root.parent).free)
            reason += f": a checkpoint needs about {readable_size(self._size)}, {left} are left"
        return reason

    def _fail(self, rank: int, text: str) -> None:
        if self._engine.parallel_rank.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)
        raise RunError(
            f"checkpoint after step {self._state.step}: {self._partial.parent} cannot be written on"
            f" rank {rank} ({text}); earlier checkpoints are as they were"
        )


def system_error(error: BaseException, folder: Path) -> OSError | None:
    """What the system said when a write into a folder failed; None where it was not the system that
    failed.

    The writer of tensors puts a message of its own in the place of the system's ("enforce fail at
    inline_container.cc"). Then a file is written to the same disk, to hear it.
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
            while written < len(_PROBE):
                written += file.write(_PROBE[written:])
            os.fsync(file.fileno())
    except OSError as found:
        return found
    finally:
        probe.unlink(missing_ok=True)
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

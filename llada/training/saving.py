"""One checkpoint of a run on its way to disk, over all ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from llada.engine.base import Engine
from llada.errors import RunError
from llada.training import checkpoint


class Saving:
    """A checkpoint that is being written; created and finished on all ranks together.

    Args:
        root: RUN/checkpoints.
        state: of the run.
        tokenizer: folder that is copied into the checkpoint.
        engine: whose state is saved.

    Raises:
        RunError: it cannot be written; what was written of it is removed, earlier checkpoints stay.
    """

    def __init__(self, root: Path, state: checkpoint.State, tokenizer: Path, engine: Engine) -> None:
        self._state, self._tokenizer, self._engine = state, tokenizer, engine
        self._partial = root / f"{checkpoint.name(state.step)}.partial"
        self._together(self._begin if engine.place.is_main else None)
        self._collective(self._start)

    @property
    def step(self) -> int:
        """Steps done in the state that is saved."""
        return self._state.step

    def _begin(self) -> None:
        checkpoint.begin(self._partial.parent, self._state.step)

    def _start(self) -> None:
        self._pending = self._engine.start_save(self._partial / "model")

    def written(self) -> bool:
        """Whether this rank has written its part."""
        return self._pending.done()

    def finish(self) -> Path:
        """Wait for every rank, then complete the checkpoint; its folder."""
        self._together(self._wait)
        self._collective(self._pending.finish)
        written = {name: entry for files in self._engine.gather(self._pending.files) for name, entry in files.items()}
        self._together((lambda: self._commit(written)) if self._engine.place.is_main else None)
        return self._partial.with_name(checkpoint.name(self._state.step))

    def _wait(self) -> None:
        self._pending.wait()
        if self._pending.error is not None:
            raise self._pending.error

    def _commit(self, written: dict[str, dict[str, object]]) -> None:
        checkpoint.commit(self._partial, self._state, self._tokenizer, written)

    def _together(self, work: Callable[[], object] | None) -> None:
        """Do this rank's part of work without communication; if any rank failed, all raise, and none waits for one that is gone."""
        problem: str | None = None
        try:
            if work is not None:
                work()
        except Exception as error:  # whatever a file system or the writer makes of it
            problem = _one_line(error)
        problems = [(rank, text) for rank, text in enumerate(self._engine.gather(problem)) if text is not None]
        if problems:
            self._fail(*problems[0])

    def _collective(self, work: Callable[[], object]) -> None:
        """Do work in which the ranks wait for each other: a rank that fails leaves at once, which ends the others' waiting."""
        try:
            work()
        except Exception as error:
            self._fail(self._engine.place.rank, _one_line(error))

    def _fail(self, rank: int, text: str) -> None:
        if self._engine.place.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)
        raise RunError(
            f"checkpoint after step {self._state.step}: {self._partial.parent} cannot be written on rank {rank} ({text}); "
            "earlier checkpoints are as they were"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

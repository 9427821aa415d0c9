"""The checkpoints that a run writes, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llada.checkpoint.format import CheckpointState
from llada.checkpoint.retention import prune_checkpoints
from llada.checkpoint.saving import CheckpointSave
from llada.config import RunConfig
from llada.engine.base import Engine
from llada.planning.summary import checkpoint_volume


class CheckpointWriter:
    """Writes checkpoints to RUN/checkpoints and deletes those that the config does not keep.

    Args:
        config: the run's config.
        engine: engine whose state is saved.
        tokenizer_files: files of the tokenizer, name -> content; only rank 0 needs them.
    """

    def __init__(
        self, config: RunConfig, engine: Engine, tokenizer_files: Mapping[str, bytes]
    ) -> None:
        self._root = Path(config.run.dir) / "checkpoints"
        self._section = config.checkpoint
        self._size = checkpoint_volume(config).bytes_each
        self._engine = engine
        self._tokenizer_files = tokenizer_files
        self._save: CheckpointSave | None = None

    def is_writing(self) -> bool:
        """Return whether this rank is still writing its part of a checkpoint."""
        return self._save is not None and not self._save.done()

    def start(self, state: CheckpointState) -> None:
        """Start to write a checkpoint; collective. The previous one must be finished."""
        assert self._save is None
        self._save = CheckpointSave(
            self._root,
            state,
            self._tokenizer_files,
            self._size,
            self._engine,
            self._engine.parallel_rank.rank,
        )

    def finish(self) -> int | None:
        """Wait for the checkpoint that is being written, and complete it; collective.

        Returns:
            The number of steps done at the checkpoint; None if none was being written.

        Raises:
            RunError: it cannot be written.
        """
        if self._save is None:
            return None
        save = self._save
        self._save = None  # before anything can fail: a failed save is not finished again
        save.finish()
        return save.step

    def prune(self) -> None:
        """Delete the checkpoints that `keep_last` and `keep_every` do not keep, on rank 0."""
        if self._engine.parallel_rank.is_main:
            prune_checkpoints(self._root, self._section.keep_last, self._section.keep_every)

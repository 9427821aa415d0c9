"""The names of checkpoint folders, and which of them are complete.

Apart from `llada.checkpoint.format`, because the batch job counts checkpoints with the standard
library alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

MARKER = "COMMITTED"
"""File that makes a checkpoint complete."""
PARTIAL_SUFFIX = ".partial"
"""Suffix of a checkpoint folder while it is written."""
DELETED_SUFFIX = ".deleted"
"""Suffix of a checkpoint folder while it is deleted."""

_COMPLETE_NAME = re.compile(r"^step_(\d{8})$")
_UNFINISHED_NAME = re.compile(r"^step_\d{8}\.(partial|deleted)$")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """Return the number of steps that a checkpoint's folder name states."""
    return int(folder.name.removeprefix("step_"))


def has_checkpoint_name(folder: Path) -> bool:
    """Return whether a folder has a complete checkpoint's name, whatever it contains."""
    return _COMPLETE_NAME.match(folder.name) is not None


def committed_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints in the folder `root`, oldest first."""
    return sorted(
        path for path in _children(root) if has_checkpoint_name(path) and (path / MARKER).is_file()
    )


def unfinished_checkpoints(root: Path) -> list[Path]:
    """Return folders that look like checkpoints but lack the marker or the final name."""
    unfinished = [path for path in _children(root) if _UNFINISHED_NAME.match(path.name)]
    return sorted(unfinished + unmarked_checkpoints(root))


def unmarked_checkpoints(root: Path) -> list[Path]:
    """Return folders with a complete checkpoint's name but without the marker.

    Such a folder has lost its marker: a save writes the marker before it gives the name.
    """
    return sorted(
        path
        for path in _children(root)
        if has_checkpoint_name(path) and not (path / MARKER).is_file()
    )


def _children(root: Path) -> Iterable[Path]:
    return root.iterdir() if root.is_dir() else ()

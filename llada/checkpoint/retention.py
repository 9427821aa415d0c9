"""Which checkpoints of a run stay: old ones are deleted, superseded ones are renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from llada.checkpoint.names import DELETED_SUFFIX, checkpoint_step, committed_checkpoints
from llada.files import sync_folder


def prune_checkpoints(root: Path, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Delete the complete checkpoints that neither setting keeps.

    With `keep_last` 2 and `keep_every` 100, of the checkpoints after steps 50, 100, 150, 200 and
    250 those after 100, 200 and 250 stay.

    A deletion renames the folder first. One that is cut off leaves a folder that is never read,
    and the next call removes it.

    Args:
        root: RUN/checkpoints.
        keep_last: keep the newest checkpoints, this many; None: delete nothing.
        keep_every: keep checkpoints whose step is a multiple of this; None: keep no others.

    Returns:
        The deleted checkpoints.
    """
    for leftover in root.glob(f"step_*{DELETED_SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)
    if keep_last is None:
        return []
    outdated = [
        path
        for path in committed_checkpoints(root)[:-keep_last]
        if keep_every is None or checkpoint_step(path) % keep_every
    ]
    for path in outdated:
        renamed = path.with_name(f"{path.name}{DELETED_SUFFIX}")
        os.replace(path, renamed)
        shutil.rmtree(renamed, ignore_errors=True)
    return outdated


def supersede_checkpoints(folders: Iterable[Path]) -> None:
    """Rename the checkpoints that a rewind leaves behind to step_NNNNNNNN.rewound-N.

    So none of them is taken for the latest one. Nothing is deleted.
    """
    for folder in folders:
        attempt = 1 + sum(1 for _ in folder.parent.glob(f"{folder.name}.rewound-*"))
        os.replace(folder, folder.with_name(f"{folder.name}.rewound-{attempt}"))
        sync_folder(folder.parent)

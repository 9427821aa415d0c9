"""Names, markers and lineage of checkpoints. What is in them is the engine's.

RUN/checkpoints/step_NNNNNNNN/ is complete when its COMMITTED file exists. It is written under a temporary name, every file is
flushed to disk, the marker is written last, and the folder is renamed: a killed save leaves a folder that is never read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llada.errors import UserError
from llada.files import sync_folder, sync_tree, write_atomically

MARKER = "COMMITTED"
STATE = "state.json"
_NAME = re.compile(r"^step_(\d{8})$")
_UNFINISHED = re.compile(r"^step_\d{8}\.partial$")


@dataclass(frozen=True)
class State:
    """What a checkpoint says of its run besides the engine's state.

    Attributes:
        step: optimizer steps done.
        samples: training samples consumed.
        tokens: training tokens consumed.
        data: fingerprint of the data.
        config: resolved config of the run.
        versions: of the packages that decide the arithmetic, and threads.
        lineage: where the weights came from, oldest first.
    """

    step: int
    samples: int
    tokens: int
    data: str
    config: dict[str, Any]
    versions: dict[str, str]
    lineage: list[dict[str, Any]]


def name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def save(root: Path, state: State, tokenizer: Path, write: Callable[[Path], None], main: bool, barrier: Callable[[], object]) -> Path:
    """Write one checkpoint; collective.

    Args:
        root: RUN/checkpoints.
        state: of the run.
        tokenizer: folder that is copied into the checkpoint.
        write: the engine's collective save into an existing empty folder.
        main: whether this rank writes what is written once.
        barrier: waits for all ranks.

    Returns:
        The committed folder.
    """
    final = root / name(state.step)
    partial = final.with_name(final.name + ".partial")
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "model").mkdir(parents=True)
        sync_folder(root.parent)  # the entry of `root` itself
    barrier()
    write(partial / "model")
    if main:
        shutil.copytree(tokenizer, partial / "tokenizer")
        write_atomically(partial / STATE, json.dumps(asdict(state), indent=1))
        sync_tree(partial)
        write_atomically(partial / MARKER, json.dumps({"step": state.step}))
        shutil.rmtree(final, ignore_errors=True)  # can only be one without a marker: it was never complete
        os.replace(partial, final)
        sync_folder(root)
    barrier()
    return final


def committed(root: Path) -> list[Path]:
    """Complete checkpoints below `root`, oldest first."""
    return sorted(path for path in _children(root) if _NAME.match(path.name) and (path / MARKER).is_file())


def ignored(root: Path) -> list[Path]:
    """Folders that look like checkpoints but lack the marker."""
    return sorted(
        path for path in _children(root) if (_NAME.match(path.name) or _UNFINISHED.match(path.name)) and not (path / MARKER).is_file()
    )


def _children(root: Path) -> Iterator[Path]:
    return root.iterdir() if root.is_dir() else iter(())


def read_state(folder: Path) -> State:
    """The state of a checkpoint. Raises UserError for a folder that is not a complete one."""
    if not folder.is_dir():
        raise UserError(f"checkpoint: no folder '{folder}'")
    if not (folder / MARKER).is_file():
        raise UserError(f"checkpoint: {folder} has no {MARKER} file, its save was cut off or it is no checkpoint")
    try:
        return State(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"checkpoint: {folder / STATE} is damaged ({error})") from None


def resolve(path: str | Path) -> Path:
    """The checkpoint meant by a checkpoint folder, or the latest one of a run folder."""
    path = Path(path)
    if (path / MARKER).is_file() or _NAME.match(path.name):
        return path
    for root in (path / "checkpoints", path):
        found = committed(root)
        if found:
            return found[-1]
    raise UserError(f"checkpoint: '{path}' is neither a checkpoint with a {MARKER} file nor a run with one")


def first_difference(old: dict[str, Any], new: dict[str, Any], allowed: tuple[str, ...], prefix: str = "") -> str | None:
    """The first setting that differs between two nested configs, as `key: old -> new`; `allowed` prefixes may differ."""
    for key in {**old, **new}:
        path = f"{prefix}{key}"
        if any(path == a or path.startswith(a + ".") for a in allowed):
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found = first_difference(before, after, allowed, path + ".")
            if found:
                return found
        elif before != after:
            return f"{path}: {before!r} -> {after!r}"
    return None

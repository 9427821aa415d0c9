"""Names, markers, retention and lineage of checkpoints. What is in them is the engine's.

RUN/checkpoints/step_NNNNNNNN/ is complete when its COMMITTED file exists. It is written under a
temporary name, every file is flushed to disk, the marker with the size and checksum of every file
is written last, and the folder is renamed: a killed save leaves a folder that is never read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llada.config.sections import ModelSection
from llada.errors import UserError
from llada.files import checksum, sync_folder, sync_tree, write_atomically
from llada.tokenizer import Tokenizer

MARKER = "COMMITTED"
STATE = "state.json"
TOKENIZER = "tokenizer"
_NAME = re.compile(r"^step_(\d{8})$")
_UNFINISHED = re.compile(r"^step_\d{8}\.(partial|deleted)$")


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
        recent: [step, loss, gradient norm] of the last applied steps (0-based), oldest first.
        validation: the last validation line of metrics.jsonl; None: there was none.
        tokenizer: fingerprint of the tokenizer; empty in checkpoints of versions that did not
            record it.
        ranks: world size of the run; 0 in checkpoints of versions that did not record it.
    """

    step: int
    samples: int
    tokens: int
    data: str
    config: dict[str, Any]
    versions: dict[str, str]
    lineage: list[dict[str, Any]]
    recent: Sequence[Sequence[float]]
    validation: dict[str, Any] | None = None
    tokenizer: str = ""
    ranks: int = 0


@dataclass(frozen=True)
class TrainedConfig:
    """The model in a checkpoint, of a run or imported.

    Attributes:
        model: its shape.
        precision: "fp32" or "bf16", what it computed in; of an imported one what its weights are
            stored in.
        longest: longest sequence that it was trained on, in this run or one before, in tokens.
    """

    model: ModelSection
    precision: str
    longest: int


def trained(state: State) -> TrainedConfig:
    """The model of a checkpoint. Raises UserError when its state does not describe one."""
    try:
        model = ModelSection.model_validate(state.config["model"])
        lengths = [
            state.config["data"]["sequence_length"],
            *(entry.get("sequence_length", 0) for entry in state.lineage),
        ]
        return TrainedConfig(model, state.config["precision"], max(lengths))
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"checkpoint: its {STATE} does not describe a model ({' '.join(str(error).split())})"
        ) from None


def name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Steps done in a checkpoint, by its folder's name."""
    return int(folder.name.removeprefix("step_"))


def load_tokenizer(folder: Path, setting: str = "checkpoint") -> Tokenizer:
    """The tokenizer in a checkpoint.

    Args:
        folder: of the checkpoint.
        setting: what the user calls it, for messages.

    Raises:
        UserError: it cannot be read, or the model was trained with another one.
    """
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    wanted = read_state(folder, setting).tokenizer
    if wanted and tokenizer.fingerprint != wanted:
        raise UserError(
            f"{setting}: {folder / TOKENIZER} is not the tokenizer that the model was trained with,"
            f" its fingerprint differs from the one in {STATE}; put the right one back, or take"
            " another checkpoint"
        )
    return tokenizer


def begin(root: Path, step: int) -> Path:
    """Make the temporary folder of a checkpoint, with an empty model/ for the engine; what an
    earlier attempt left there is removed.

    The folder of the run must exist: it is not made again where it was deleted.
    """
    partial = root / f"{name(step)}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    root.mkdir(exist_ok=True)
    (partial / "model").mkdir(parents=True)
    sync_folder(root.parent)  # the entry of `root` itself
    return partial


def commit(
    partial: Path, state: State, tokenizer: Mapping[str, bytes], written: dict[str, dict[str, Any]]
) -> Path:
    """Complete a checkpoint and give it its name.

    Args:
        partial: from `begin`, with the engine's files in model/.
        state: of the run.
        tokenizer: files of the tokenizer, name -> content.
        written: size and checksum of the files in model/ that are known already; the others are
            read again.
    """
    final = partial.with_name(name(state.step))
    seal(partial, state, tokenizer, written)
    # can only be one without a marker: it was never complete
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync_folder(partial.parent)
    return final


def seal(
    folder: Path, state: State, tokenizer: Mapping[str, bytes], written: dict[str, dict[str, Any]]
) -> None:
    """Write all of a checkpoint but its model/, the marker last; see `commit`."""
    (folder / TOKENIZER).mkdir()
    for file, content in tokenizer.items():
        (folder / TOKENIZER / file).write_bytes(content)
    write_atomically(folder / STATE, json.dumps(asdict(state), indent=1))
    sync_tree(folder)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    sums = {
        file: written.get(file.removeprefix("model/")) or checksum(folder / file) for file in files
    }
    write_atomically(folder / MARKER, json.dumps({"step": state.step, "files": sums}, indent=1))


def verify_checkpoint(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """What differs between a committed checkpoint's files and its marker, one line each.

    Args:
        folder: of the checkpoint.
        share, shares: look at every `shares`-th file from number `share` on, so that ranks can
        divide the work.
    """
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder / MARKER} is damaged ({error})"]
    found = []
    for file, wanted in sorted(files.items())[share::shares]:
        path = folder / file
        try:
            size = path.stat().st_size
            if size != wanted["bytes"]:
                found.append(f"{path} has {size} bytes, its marker says {wanted['bytes']}")
            elif checksum(path) != wanted:
                found.append(f"{path} has another checksum than its marker says")
        except OSError as error:
            found.append(f"{path} cannot be read ({error.strerror})")
    return found


def prune(root: Path, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Delete complete checkpoints that are neither among the newest nor exempt; returns them. A
    deletion that is cut off leaves a folder that is never read, and the next one removes it.
    """
    for left in root.glob("step_*.deleted"):
        shutil.rmtree(left, ignore_errors=True)
    if keep_last is None:
        return []
    old = [
        path
        for path in committed(root)[:-keep_last]
        if keep_every is None or step_of(path) % keep_every
    ]
    for path in old:
        gone = path.with_name(f"{path.name}.deleted")
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
    return old


def supersede(folders: list[Path]) -> None:
    """Rename checkpoints that a rewind leaves behind, so that none of them is found as the latest;
    nothing is deleted.
    """
    for folder in folders:
        attempt = 1 + sum(1 for _ in folder.parent.glob(f"{folder.name}.rewound-*"))
        os.replace(folder, folder.with_name(f"{folder.name}.rewound-{attempt}"))
        sync_folder(folder.parent)


def committed(root: Path) -> list[Path]:
    """Complete checkpoints below `root`, oldest first."""
    return sorted(
        path for path in _children(root) if _NAME.match(path.name) and (path / MARKER).is_file()
    )


def ignored(root: Path) -> list[Path]:
    """Folders that look like checkpoints but lack the marker or the name."""
    return sorted(
        path
        for path in _children(root)
        if _UNFINISHED.match(path.name)
        or (_NAME.match(path.name) and not (path / MARKER).is_file())
    )


def unmarked(root: Path) -> list[Path]:
    """Folders with a complete checkpoint's name but no marker: it was lost, since a folder gets the
    name after the marker.
    """
    return [path for path in ignored(root) if _NAME.match(path.name)]


def _children(root: Path) -> Iterator[Path]:
    return root.iterdir() if root.is_dir() else iter(())


def read_state(folder: Path, setting: str = "checkpoint") -> State:
    """The state of a checkpoint. Raises UserError, with what the user calls the folder, when it is
    not a complete one.
    """
    if not folder.is_dir():
        raise UserError(f"{setting}: no folder '{folder}'")
    if not (folder / MARKER).is_file():
        raise UserError(
            f"{setting}: {folder} has no {MARKER} file, its save was cut off or it is no checkpoint"
        )
    try:
        return State(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{setting}: {folder / STATE} is damaged ({error})") from None


def resolve(path: str | Path, setting: str = "checkpoint") -> Path:
    """The checkpoint meant by a checkpoint folder, or the latest one of a run folder.

    Raises UserError, with what the user calls the folder, when there is none.
    """
    path = Path(path)
    # False too for a name that no file can have
    if os.path.isfile(path / MARKER) or _NAME.match(path.name):
        return path
    for root in (path / "checkpoints", path) if os.path.isdir(path) else ():
        found = committed(root)
        if found:
            return found[-1]
    if not os.path.exists(path):
        raise UserError(f"{setting}: no folder '{path}'")
    raise UserError(
        f"{setting}: '{path}' is neither a checkpoint with a {MARKER} file nor a run with one"
    )


def first_difference(
    old: dict[str, Any], new: dict[str, Any], allowed: tuple[str, ...], prefix: str = ""
) -> str | None:
    """The first setting that differs between two nested configs, as `key: old -> new`; `allowed`
    prefixes may differ.
    """
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
